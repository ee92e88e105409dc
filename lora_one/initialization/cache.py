"""Solutions on disk, each under everything it depends on: safetensors for the factors, JSON for the rest."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lora_one.distributed import Processes
from lora_one.errors import RunError
from lora_one.files import write_json
from lora_one.initialization.backward import GradientReport
from lora_one.initialization.start import Solution
from lora_one.losses import Batch
from lora_one.types import AdapterFactors

Key = dict[str, Any]  # flat, of plain values


@dataclasses.dataclass(frozen=True)
class Cache:
    """A folder of solutions; ``say`` is told where one came from, or what changed since those that are there."""

    folder: Path
    key: Key
    say: Callable[[str], None] = print

    def __call__(self, solve: Callable[[], Solution]) -> Solution:
        """The solution kept under the key, else the one that ``solve`` finds, which is then kept.

        Several processes all read or all solve; the first of them writes.
        Raises RunError: the folder cannot be written; what was there is untouched.
        """
        processes = Processes.current()
        known = self.read()
        if all(processes.gathered(known is not None)):
            self.say(f"init.cache: from {self.file}")
            return dataclasses.replace(known, cached=True)
        self.say(f"init.cache: computed anew, {self.why()}")
        try:  # before the work, not after it
            self.folder.mkdir(parents=True, exist_ok=True)
            TemporaryDirectory(dir=self.folder, prefix=".").cleanup()
        except OSError as error:
            raise self.unwritable(error) from error
        solution = solve()
        if processes.rank == 0:
            self.write(solution)
        return solution

    @property
    def file(self) -> Path:
        digest = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{digest[:16]}.safetensors"

    def read(self) -> Solution | None:
        """None where there is none, or none that can be read."""
        try:
            told = json.loads(self.file.with_suffix(".json").read_text())
            tensors = load_file(self.file)
            factors = {
                name: AdapterFactors(tensors[f"{name}.B"], tensors[f"{name}.A"], shifted, tensors.get(f"{name}.R"))
                for name, shifted in told["layers"].items()
            }
            examples = GradientReport(**told["examples"]) if told["examples"] else None
            searched = {float(gamma): loss for gamma, loss in told["searched"].items()}
            return Solution(
                factors,
                told["energies"],
                examples,
                told["predicted_decrease"],
                searched,
                told["gamma"],
                loss=told["loss"],
                searched_on=told["searched_on"],
                vectors={name: (tensors[f"{name}.U"], tensors[f"{name}.Vh"]) for name in told["vectors"]},
            )
        except (OSError, ValueError, KeyError, SafetensorError):
            return None

    def write(self, solution: Solution) -> None:
        tensors = {
            f"{name}.{letter}": factor.cpu().contiguous()
            for name, factors in solution.factors.items()
            for letter, factor in (("B", factors.B), ("A", factors.A), ("R", factors.R))
            if factor is not None
        }
        for name, (U, Vh) in solution.vectors.items():
            tensors |= {f"{name}.U": U.contiguous(), f"{name}.Vh": Vh.contiguous()}
        told = {
            "key": self.key,
            "layers": {name: factors.shift_base for name, factors in solution.factors.items()},
            "energies": solution.energies,
            "examples": dataclasses.asdict(solution.examples) if solution.examples else None,
            "predicted_decrease": solution.predicted_decrease,
            "searched": {str(gamma): loss for gamma, loss in solution.searched.items()},
            "gamma": solution.gamma,
            "loss": solution.loss,
            "searched_on": solution.searched_on,
            "vectors": list(solution.vectors),
        }
        try:
            with TemporaryDirectory(dir=self.folder, prefix=".") as scratch:  # its own: two jobs may find one start
                file = Path(scratch) / self.file.name
                save_file(tensors, file)
                file.replace(self.file)
            write_json(self.file.with_suffix(".json"), told)  # last: an entry without it is none
        except (OSError, SafetensorError) as error:
            raise self.unwritable(error) from error

    def unwritable(self, error: Exception) -> RunError:
        return RunError(f"init.cache={self.folder} cannot be written ({error}): free space or give another folder")

    def why(self) -> str:
        """What sets the key apart from the nearest one that is here."""
        others = []
        for path in sorted(self.folder.glob("*.json")) if self.folder.is_dir() else ():
            try:
                others.append(json.loads(path.read_text())["key"])
            except (OSError, ValueError, KeyError):
                continue
        changes = min((self._changes(other) for other in others), key=len, default=None)
        if changes is None:
            return f"{self.folder} holds no start yet"
        return (
            f"of those in {self.folder} the nearest has another " + ", ".join(changes)
            if changes
            else (f"{self.file} is not readable")
        )

    def _changes(self, other: Key) -> list[str]:
        names = [name for name in {**self.key, **other} if self.key.get(name) != other.get(name)]
        return [f"{name} ({other.get(name)}, here {self.key.get(name)})" for name in names]


def content_of(batches: Sequence[Batch]) -> str:
    """sha256 over what the batches hold, names and shapes included."""
    total = hashlib.sha256()
    for batch in batches:
        for name, values in sorted(batch.items()):
            total.update(f"{name} {tuple(values.shape)} {values.dtype}\0".encode())
            total.update(values.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
