"""The command ``lora-one-merge`` (scripts/merge.py): write merged_checkpoint/ of a finished run."""

from collections.abc import Sequence
from pathlib import Path

from lora_one.errors import UsageError
from lora_one.invocation import Parser, command_name
from lora_one.records.folder import RunFolder
from lora_one.runs.sweep import run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, by default on sys.argv; return the exit code."""
    parser = Parser(
        prog=command_name(), description="Write merged_checkpoint/ of a finished run, a plain Hugging Face folder."
    )
    parser.add_argument("run", type=Path, help="folder of the run, or its run.json")
    parser.add_argument("--model_name", type=Path, help="where the run's local model is now, if it was moved")
    given = parser.parse_args(arguments)
    return run_command(lambda: merge(given.run, given.model_name), "merges again")


def merge(path: Path, base: Path | None = None) -> None:
    """Merge the run in this folder, or of this run.json. base: where its local model is now; None: where it was.

    Raises UsageError: it is not a run.
    """
    from lora_one.runs.saving import merge_run  # imports torch

    folder = RunFolder(path.parent if path.name == "run.json" else path)
    if not folder.run_json.exists():
        raise UsageError(f"{path} has no run.json: pass the folder of a run, as run_exp.py prints it")
    with folder.locked():
        merge_run(folder, base)
