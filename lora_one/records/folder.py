"""The output folder of a run: its name, which depends on the configuration alone, its lock, and run.json."""

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from errno import ENAMETOOLONG
from pathlib import Path
from typing import Any

from lora_one.config import RunConfig
from lora_one.errors import RunError
from lora_one.files import write_json, writing
from lora_one.progress import first_process


def folder_of(run: RunConfig, config_hash: str) -> Path:
    """Return <results_dir>/<wandb.project>_<dataset>/<name>-<first 8 digits of the hash>/<seed>."""
    name = run.wandb.name or method_name(run)
    root = Path(run.results_dir).expanduser()
    return root / f"{run.wandb.project}_{run.dataset.name}" / f"{name}-{config_hash[:8]}" / str(run.seed)


@dataclass(frozen=True)
class LocatedRun:
    """A run and its output folder.

    run: the settings, with the rank that ``peft.lora_relative_r`` gives.
    fingerprints: hashes of the content of a local model and of local data, by configuration key.
    config_hash: the hash of everything that can change the adapter.
    """

    run: RunConfig
    fingerprints: dict[str, str]
    config_hash: str
    folder: "RunFolder"


def locate(run: RunConfig) -> LocatedRun:
    """Find the output folder of a run. Raises UsageError: the model's folder does not exist."""
    # imported here, because this file is imported before the settings are checked, and torch takes seconds
    from lora_one.models import local_folder, with_rank
    from lora_one.records.provenance import config_hash, local_fingerprints

    run = with_rank(run)
    fingerprints = local_fingerprints(run.to_dict(), local_folder(run.model.name))
    digest = config_hash(run.published(), fingerprints)
    return LocatedRun(run, fingerprints, digest, RunFolder(folder_of(run, digest)))


def reason_in(record: dict[str, Any]) -> str:
    """Return why a run that is not finished has no result. record: its run.json, which keeps the last error."""
    if record["status"] == "failed":
        return " ".join((record.get("error") or "no reason is known").split())
    return f"not finished, its status is {record['status']}"


def method_name(run: RunConfig) -> str:
    """Return the method and its main settings, for example ``LoRA-One-r8-a16-g128-lr0.0002``."""
    init, peft = run.init, run.peft
    optimizer = [run.optimizer.name] if run.optimizer.name != "adamw" else []
    ending = [*optimizer, f"lr{run.model.learning_rate:g}"]
    if peft.trains_base:
        start = [init.short_name, *init.folder_parts(peft.lora_alpha)] if init.steps_weights else ["full-ft"]
        return "-".join([*start, *ending])
    name = peft.own_start or init.short_name
    parts = [init.with_dora(name) if peft.dora else name, f"r{peft.lora_r}", *init.folder_parts(peft.lora_alpha)]
    if peft.train_embeddings:
        parts.append("emb")
    if run.model.quantization:
        parts.append(run.model.quantization)
    return "-".join([*parts, *ending])


class RunFolder:
    """The paths and the record (run.json) of one run. Every process may read; only the first one writes."""

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
    def with_template(self) -> bool:
        """Return whether the run's prompts are in the tokenizer's chat template."""
        return bool(self.read().get("config", {}).get("dataset", {}).get("chat_template"))

    @property
    def trained(self) -> Path:
        """Return the folder that a finished run trained: its adapter, or the model after full fine-tuning."""
        return self.adapter if self.adapter.exists() else self.merged

    def read(self) -> dict[str, Any]:
        """Return the content of run.json, {} if there is no file. Raises RunError: it is not valid JSON."""
        if not self.run_json.exists():
            return {}
        try:
            return json.loads(self.run_json.read_text())
        except ValueError as error:
            reason = f"{self.run_json} is not valid JSON ({error})"
            raise RunError(f"{reason}: move it away, and the run starts again") from error

    def update(self, **entries: Any) -> dict[str, Any]:
        """Merge entries into run.json, and return its content. Raises RunError: it cannot be written."""
        record = self.read() | entries
        if first_process():
            with writing(self.run_json):
                write_json(self.run_json, record)
        return record

    @property
    def finished(self) -> bool:
        return self.read().get("status") == "finished"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder within the block; the system releases the lock when the process ends, however it ends.

        Raises RunError: the folder cannot be created or written, or another process has the lock.
        """
        if not first_process():
            yield
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("w")
        except OSError as error:
            way_out = "shorten wandb.name" if error.errno == ENAMETOOLONG else "set results_dir=<a writable folder>"
            raise RunError(f"results folder {self.path} cannot be written ({error.strerror}): {way_out}") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RunError(
                    f"another process is running in {self.path}: wait until it ends, or change a setting, such as seed"
                ) from error
            except OSError as error:
                raise RunError(
                    f"the file system of {self.path} cannot lock files ({error.strerror}), so two processes could "
                    "write to this folder: mount it with locks (flock), or set results_dir to another one"
                ) from error
            self.clear_leftovers()
            yield

    def clear_leftovers(self) -> None:
        """Remove the incomplete files and folders of a killed process; their names begin with a dot."""
        for entry in [*self.path.glob(".*"), *self.checkpoints.glob(".*"), *self.epochs.glob(".*")]:
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name != ".lock":
                entry.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove everything except the lock, before a run that does not resume."""
        for entry in self.path.iterdir():
            if entry.name == ".lock":
                continue
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def run_of(model: Path) -> RunFolder | None:
    """Return the run that saved a model (its adapter/, merged_checkpoint/ or one of epochs/<n>); None: no run did.

    Also None if there is no such path, because the name of a hub model says nothing of the working folder.
    """
    if not model.expanduser().exists():
        return None
    above = model.expanduser().resolve().parent
    folder = RunFolder(above.parent if above.name == "epochs" else above)
    return folder if folder.run_json.exists() else None


def config_of(model: Path | None) -> dict[str, Any]:
    """Return the configuration of the run that saved a model; {}: no run did."""
    run = run_of(model) if model else None
    return run.read().get("config", {}) if run else {}


def revision_of(adapter: Path | None, name: str) -> str | None:
    """Return the commit or the revision of the model ``name`` on which a run trained its adapter; None: the default.

    None also if the adapter belongs to no run, or was trained on another model.
    """
    run = run_of(adapter) if adapter else None
    record = run.read() if run else {}
    return revision_in(record) if record.get("config", {}).get("model", {}).get("name") == name else None


def revision_in(record: dict[str, Any]) -> str | None:
    """Return the commit of the hub model that a run began with, or, if it is not known, the configured revision.

    record: the content of run.json.
    """
    return record.get("provenance", {}).get("model_commit") or record["config"]["model"]["revision"]


def base_of(adapter: Path | None, dtype: str = "auto") -> dict[str, str]:
    """Return {dtype, quantization}, with which a run loaded the quantised base of its adapter.

    Empty if the base was not quantised or the adapter does not belong to a run. dtype: auto: that of the run.
    """
    model = config_of(adapter).get("model", {})
    if not model.get("quantization"):
        return {}
    of_run = "bf16" if model["bf16"] else "fp32"
    return {"dtype": of_run if dtype == "auto" else dtype, "quantization": model["quantization"]}
