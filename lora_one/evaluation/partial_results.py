"""Files with the completions of an unfinished evaluation."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_one.errors import UsageError
from lora_one.evaluation.benchmark import Request
from lora_one.evaluation.decoding import Completion
from lora_one.evaluation.output import first_difference
from lora_one.files import whole_lines, write_whole, writing
from lora_one.interruption import note_progress

if TYPE_CHECKING:
    from lora_one.distributed import Processes


class PartialResults:
    """Completions that are saved while an evaluation runs, so an interrupted evaluation can continue.

    Each process writes one file; any number of processes can continue from these files. The first line contains the
    model and the settings. Reading raises UsageError if the files belong to another evaluation.
    """

    def __init__(self, path: Path, identity: dict[str, Any], processes: "Processes"):
        self.first, self.processes = path, processes
        self.path = path if processes.rank == 0 else path.with_suffix(f".{processes.rank}.jsonl")
        self.identity = json.loads(json.dumps(identity))

    @property
    def files(self) -> list[Path]:
        return sorted(self.first.parent.glob(f"{self.first.stem}*.jsonl"))

    @property
    def likelihoods(self) -> Path:
        """Return the file of what ``engines.remembered`` saves."""
        return self.first.with_name("likelihoods.partial.jsonl")

    @property
    def engine(self) -> dict[str, Any] | None:
        """Return the identity of the engine whose completions are saved; None: there are none, or it is not known."""
        try:
            return json.loads(self.first.read_text().partition("\n")[0]).get("engine")
        except (OSError, ValueError):
            return None

    def read(self, *, overwrite: bool) -> dict[Request, Completion]:
        """Return the completions saved by all processes.

        overwrite: remove them first, unless this evaluation has already begun to replace a finished one.
        """
        if overwrite and self.processes.rank == 0 and not self.of_a_replacement():
            self.remove()
        self.processes.meet()
        found = self.gathered()
        self.processes.meet()  # all processes have read the files before one of them writes
        return found

    def of_a_replacement(self) -> bool:
        """Return whether the files are of this evaluation, and newer than the finished results beside them."""
        finished = self.first.with_name("metrics.json")
        try:
            newest = max((file.stat().st_mtime_ns for file in self.files), default=0)
            return newest > finished.stat().st_mtime_ns and bool(self.gathered())
        except (OSError, UsageError):
            return False

    def gathered(self) -> dict[Request, Completion]:
        """Return the completions in all files."""
        return {request: completion for file in self.files for request, completion in self.lines(file).items()}

    def lines(self, path: Path) -> dict[Request, Completion]:
        """Return the completions of one file; an incomplete last line is ignored, and removed by the first process."""
        text = path.read_text()
        whole = whole_lines(text)
        try:
            first, *lines = map(json.loads, whole.split("\n")[:-1] or ["{}"])  # not even the first line is complete
            first = dict(first)
            found = {(example, sample): Completion(*completion) for example, sample, *completion in lines}
        except (ValueError, TypeError) as error:
            raise UsageError(f"{path} is damaged ({error}): remove it, or pass --overwrite") from error
        difference = first_difference(self.identity | first, self.identity)  # earlier versions wrote fewer parts
        if difference is not None:
            raise UsageError(
                f"{path} contains unfinished results of another model or other settings ({difference}): pass "
                "--output_dir=<another folder>, or --overwrite to remove them"
            )
        if whole != text and self.processes.rank == 0:
            write_whole(path, whole)
        return found

    def add(self, request: Request, completion: Completion) -> None:
        """Append a completion to this process's file. Raises RunError: it cannot be written (no space, for example)."""
        known = [completion.text, completion.too_long, completion.details, completion.room, completion.cut_off]
        line = json.dumps([*request, *known]) + "\n"
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as stream:
                stream.write(line if stream.tell() else json.dumps(self.identity) + "\n" + line)
        note_progress()

    def remove(self) -> None:
        for file in (*self.files, self.likelihoods):
            file.unlink(missing_ok=True)
