"""A run's folder: its name from the configuration alone, its lock, and run.json, written whole or not at all."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_one.config import RunConfig
from lora_one.errors import RunError
from lora_one.files import write_json


def folder_of(run: RunConfig, config_hash: str) -> Path:
    """<results_dir>/<wandb.project>_<dataset>/<name>-<hash8>/<seed>, SPEC-stable across processes."""
    name = run.wandb.name or method_name(run)
    root = Path(run.results_dir).expanduser()
    return root / f"{run.wandb.project}_{run.dataset.name}" / f"{name}-{config_hash[:8]}" / str(run.seed)


@dataclass(frozen=True)
class Placed:
    """A run as it is executed, with its rank known; the fingerprints of local inputs, the hash of all, the folder."""

    run: RunConfig
    fingerprints: dict[str, str]
    identity: str
    folder: "RunFolder"


def placed(run: RunConfig) -> Placed:
    """Find the folder of a run. Raises UsageError: the model's folder is not there."""
    # torch comes late: the settings are checked before it is imported
    from lora_one.models import local_folder, with_rank
    from lora_one.records.provenance import config_hash, local_fingerprints

    run = with_rank(run)
    fingerprints = local_fingerprints(run.to_dict(), local_folder(run.model.name))
    identity = config_hash(run.published(), fingerprints)
    return Placed(run, fingerprints, identity, RunFolder(folder_of(run, identity)))


def method_name(run: RunConfig) -> str:
    """The method and its main knobs: ``LoRA-One-r8-a16-g128-lr0.0002``."""
    init = run.init
    if not run.peft.use_peft:
        scaled = [run.optimizer.name] if run.optimizer.name != "adamw" else []
        return "-".join(["full-ft", *scaled, f"lr{run.model.learning_rate:g}"])
    name = "AdaLoRA" if run.peft.adalora else init.short_name
    parts = [init.with_dora(name) if run.peft.dora else name, f"r{run.peft.lora_r}"]
    parts += init.folder_parts(run.peft.lora_alpha)
    if run.peft.train_embeddings:
        parts.append("emb")
    if run.model.quantization:
        parts.append(run.model.quantization)
    if run.optimizer.name != "adamw":
        parts.append(run.optimizer.name)
    return "-".join([*parts, f"lr{run.model.learning_rate:g}"])


class RunFolder:
    """Paths and record of one run; every rank may read, rank 0 writes."""

    def __init__(self, path: Path):
        self.path = path
        self.run_json = path / "run.json"
        self.metrics = path / "metrics.jsonl"
        self.adapter = path / "adapter"
        self.merged = path / "merged_checkpoint"
        self.checkpoints = path / "checkpoints"
        self.epochs = path / "epochs"
        self.initial_factors = self.checkpoints / "initial_factors.safetensors"
        self.gradient_vectors = self.checkpoints / "gradient_vectors.safetensors"

    @property
    def trained(self) -> Path:
        """What a finished run trained: its adapter, or the whole model after full fine-tuning."""
        return self.adapter if self.adapter.exists() else self.merged

    def read(self) -> dict[str, Any]:
        """run.json, or an empty record. Raises RunError when it is no JSON."""
        if not self.run_json.exists():
            return {}
        try:
            return json.loads(self.run_json.read_text())
        except ValueError as error:
            raise RunError(f"{self.run_json} is not readable JSON ({error}): move it away to run again") from error

    def update(self, **entries: Any) -> dict[str, Any]:
        """Merge entries into run.json."""
        record = self.read() | entries
        if first_process():
            write_json(self.run_json, record)
        return record

    @property
    def finished(self) -> bool:
        return self.read().get("status") == "finished"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder; a second process on it is refused while this one lives, however it ends.

        Raises RunError: the folder cannot be made or written, or another process holds it.
        """
        if not first_process():
            yield
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise RunError(
                f"results folder {self.path} cannot be written ({error.strerror}): set results_dir=<a writable folder>"
            ) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RunError(
                    f"another process is running in {self.path}: wait for it, or change seed or a knob"
                ) from error
            self.clear_leftovers()
            yield

    def clear_leftovers(self) -> None:
        """Remove what a killed process left half-written; all of that is hidden."""
        for entry in [*self.path.glob(".*"), *self.checkpoints.glob(".*"), *self.epochs.glob(".*")]:
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name != ".lock":
                entry.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove everything but the lock: the run starts from nothing."""
        for entry in self.path.iterdir():
            if entry.name == ".lock":
                continue
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def first_process() -> bool:
    """Whether this is the process that writes, of those that a launcher has started."""
    return os.environ.get("RANK", "0") == "0"


def run_of(model: Path) -> RunFolder | None:
    """The run that left a model: as its adapter/, its merged_checkpoint/ or one of its epochs/<n>. None: no run did."""
    above = model.expanduser().resolve().parent
    folder = RunFolder(above.parent if above.name == "epochs" else above)
    return folder if folder.run_json.exists() else None


def base_of(adapter: Path | None) -> dict[str, str]:
    """How a run loaded the quantised base of its adapter, by its run.json: dtype and quantization.

    Empty for another base, and where no run left the adapter.
    """
    run = run_of(adapter) if adapter else None
    model = run.read().get("config", {}).get("model", {}) if run else {}
    if not model.get("quantization"):
        return {}
    return {"dtype": "bf16" if model["bf16"] else "fp32", "quantization": model["quantization"]}
