"""Cache of solutions on disk, keyed by everything they depend on: safetensors for the factors, JSON for the rest."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lora_one.distributed import Processes
from lora_one.errors import RunError
from lora_one.files import synced, write_json
from lora_one.initialization.backward import GradientReport
from lora_one.initialization.solution import Solution
from lora_one.losses import Batch
from lora_one.types import AdapterFactors

Key = dict[str, Any]  # flat, of plain values


@dataclasses.dataclass(frozen=True)
class Cache:
    """A folder of solutions. say: prints that a solution was read, or how its key differs from those in the folder."""

    folder: Path
    key: Key
    say: Callable[[str], None] = print

    def __call__(self, solve: Callable[[], Solution]) -> Solution:
        """Return the cached solution; if there is none, call ``solve`` and cache its result.

        Either all processes read or all solve; the first one writes. If that fails, it is only a note, because the
        solution is there.
        Raises RunError: the folder cannot be written, which is found before the computation.
        """
        processes = Processes.current()
        known = self.read()
        if all(processes.gathered(known is not None)):
            self.say(f"init.cache: read from {self.file}")
            return known
        self.say(f"init.cache: computed, because {self.why()}")
        try:  # check before the computation, not after it
            self.folder.mkdir(parents=True, exist_ok=True)
            TemporaryDirectory(dir=self.folder, prefix=".").cleanup()
        except OSError as error:
            raise RunError(
                f"init.cache={self.folder} cannot be written ({error}): free some disk space, or set it to another "
                "folder"
            ) from error
        begun = time.perf_counter()
        solution = solve()
        if processes.rank == 0:
            try:
                self.write(solution, time.perf_counter() - begun)
            except (OSError, SafetensorError) as error:
                self.say(f"note: init.cache: the initialisation cannot be stored in {self.folder} ({error})")
        return solution

    @property
    def file(self) -> Path:
        """Return the file of the factors; the JSON file next to it has the same stem."""
        return self.folder / f"{digest_of(self.key)}.safetensors"

    def read(self) -> Solution | None:
        """Return the cached solution; None: it is missing or cannot be read."""
        try:
            saved = entry_in(self.file.with_suffix(".json"), self.key)
            tensors = load_file(self.file)
            factors = {
                name: AdapterFactors(tensors[f"{name}.B"], tensors[f"{name}.A"], shifted, tensors.get(f"{name}.R"))
                for name, shifted in saved["layers"].items()
            }
            examples = GradientReport(**saved["examples"]) if saved["examples"] else None
            searched = {float(gamma): loss for gamma, loss in saved["searched"].items()}
            return Solution(
                factors,
                saved["energies"],
                examples,
                saved["predicted_decrease"],
                searched,
                saved["gamma"],
                loss=saved["loss"],
                searched_on=saved["searched_on"],
                cached=True,
                seconds=saved["seconds"],
                vectors={name: (tensors[f"{name}.U"], tensors[f"{name}.Vh"]) for name in saved["vectors"]},
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
            return None

    def write(self, solution: Solution, seconds: float) -> None:
        """Write a solution that took so many seconds. Raises OSError, SafetensorError."""
        tensors = {
            f"{name}.{letter}": factor.cpu().contiguous()
            for name, factors in solution.factors.items()
            for letter, factor in (("B", factors.B), ("A", factors.A), ("R", factors.R))
            if factor is not None
        }
        for name, (U, Vh) in solution.vectors.items():
            tensors |= {f"{name}.U": U.contiguous(), f"{name}.Vh": Vh.contiguous()}
        saved = {
            "key": self.key,
            "layers": {name: factors.shift_base for name, factors in solution.factors.items()},
            "energies": solution.energies,
            "examples": dataclasses.asdict(solution.examples) if solution.examples else None,
            "predicted_decrease": solution.predicted_decrease,
            "searched": {str(gamma): loss for gamma, loss in solution.searched.items()},
            "gamma": solution.gamma,
            "loss": solution.loss,
            "searched_on": solution.searched_on,
            "seconds": seconds,
            "vectors": list(solution.vectors),
        }
        # a scratch folder of its own, because two jobs may write the same solution
        with TemporaryDirectory(dir=self.folder, prefix=".") as scratch:
            file = Path(scratch) / self.file.name
            save_file(tensors, file)
            synced(file)
            file.replace(self.file)
        write_json(self.file.with_suffix(".json"), saved)  # last, because it makes the entry complete

    def why(self) -> str:
        """Return why no entry was found: how the key differs from the most similar one in the folder."""
        others = []
        for path in sorted(self.folder.glob("*.json")) if self.folder.is_dir() else ():
            with suppress(OSError, ValueError):
                others.append(entry_in(path)["key"])
        changes = min((self._changes(other) for other in others), key=len, default=None)
        if changes is None:
            return f"{self.folder} contains no initialisation yet"
        if not changes:
            return f"{self.file} cannot be read"
        return f"the most similar entry of {self.folder} differs in {', '.join(changes)}"

    def _changes(self, other: Key) -> list[str]:
        names = [name for name in {**self.key, **other} if self.key.get(name) != other.get(name)]
        return [f"{name} ({other.get(name)} there, {self.key.get(name)} here)" for name in names]


def entry_in(file: Path, key: Key | None = None) -> dict[str, Any]:
    """Return the content of an entry's JSON file. key: the one that it must have.

    Raises OSError; ValueError: it is not an entry, or one of another key.
    """
    saved = json.loads(file.read_text())
    if not isinstance(saved, dict) or not isinstance(saved.get("key"), dict):
        raise ValueError(f"{file} is not an entry of a cache")
    if key is not None and digest_of(saved["key"]) != digest_of(key):
        raise ValueError(f"{file} is the entry of another key")
    return saved


def digest_of(key: Key) -> str:
    """Return the beginning of the sha256 of a key, the stem of the files of its entry."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def content_of(batches: Sequence[Batch]) -> str:
    """Return the sha256 of the batches' content, with names and shapes."""
    total = hashlib.sha256()
    for batch in batches:
        for name, values in sorted(batch.items()):
            if not isinstance(values, torch.Tensor):
                total.update(f"{name} {values!r}\0".encode())
                continue
            total.update(f"{name} {tuple(values.shape)} {values.dtype}\0".encode())
            total.update(values.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
