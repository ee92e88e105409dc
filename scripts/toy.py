"""Run one of the LoRA-One paper's toy experiments: a table (CSV) and a figure (PNG) of it.

python scripts/toy.py t1            gradient descent from LoRA's start aligns with the one-step gradient
python scripts/toy.py t2            risk of the spectral start, LoRA-GA and LoRA-SB on the linear problem
python scripts/toy.py t3            phase portrait of three parameters
python scripts/toy.py t4            ReLU student: the rate does not depend on the condition number
python scripts/toy.py t5 --model real_models/minilm-l6 --data ../shared/data/glue/MRPC
                                    principal angles over the steps, LoRA and LoRA-One, MiniLM on MRPC

t1 to t4 take seconds on one core; t5 takes some minutes on two. docs/toy.md describes settings and columns.
"""

import argparse
import csv
import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lora_one.errors import UsageError, nearest
from lora_one.runs.sweep import run_command

EXPERIMENTS = {"t1": "alignment", "t2": "risk", "t3": "phase_portrait", "t4": "relu", "t5": "angles"}
ON_A_MODEL = "t5"
FILES = {"model": ("config.json", "a BERT encoder, such as MiniLM-L6"), "data": ("train.tsv", "MRPC (GLUE)")}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("experiment", help=", ".join(EXPERIMENTS))
    made.add_argument("--out", type=Path, default=Path("results/toy"), help="folder of the two files (results/toy)")
    made.add_argument("--model", type=Path, help="t5: folder of a BERT encoder (MiniLM-L6)")
    made.add_argument("--data", type=Path, help="t5: folder of MRPC with train.tsv")
    return made


def checked(options: argparse.Namespace) -> dict[str, Path]:
    """Return the arguments of the experiment.

    Raises UsageError: an unknown experiment, an option that it does not use, or a missing folder.
    """
    if options.experiment not in EXPERIMENTS:
        raise UsageError(f"{options.experiment} is not an experiment; {nearest(options.experiment, EXPERIMENTS)}")
    given = {"model": options.model, "data": options.data}
    if options.experiment != ON_A_MODEL:
        for name, value in given.items():
            if value is not None:
                raise UsageError(f"--{name}={value} is used only by {ON_A_MODEL}: leave it out")
        return {}
    for name, (file, what) in FILES.items():
        if given[name] is None or not (given[name] / file).exists():
            found = f"--{name} is not given" if given[name] is None else f"--{name}={given[name]} has no {file}"
            raise UsageError(f"{found}: pass the folder of {what}")
    return given


def run(options: argparse.Namespace) -> None:
    """Run the experiment and write its table and its figure. Raises UsageError: see ``checked`` and ``ready``."""
    arguments = checked(options)
    ready(options.out)
    experiment = importlib.import_module(f"toys.{EXPERIMENTS[options.experiment]}")
    from lora_one.reports.figures import Drawing

    begun = time.perf_counter()
    found = experiment.rows(**arguments)
    table, image = (options.out / f"{options.experiment}.{kind}" for kind in ("csv", "png"))
    with table.open("w", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(experiment.Row._fields)
        lines.writerows(found)
    image.write_bytes(Drawing(options.experiment, experiment.CAPTION, experiment.figure(found)).png())
    print(f"{experiment.CAPTION}: {time.perf_counter() - begun:.0f} s\n{table}\n{image}")


def ready(folder: Path) -> None:
    """Create the folder. Raises UsageError: it cannot be created, or files cannot be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"--out={folder} cannot be written ({error.strerror}): choose another folder") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, by default on sys.argv; return the exit code."""
    options = parser().parse_args(arguments)
    return run_command(lambda: run(options), "runs the experiment again")


if __name__ == "__main__":
    sys.exit(main())
