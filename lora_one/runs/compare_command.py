"""The command ``lora-one-compare`` (scripts/compare.py): run the comparison that a YAML file describes."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from lora_one.interruption import Interrupted, caught
from lora_one.invocation import command_name
from lora_one.runs.sweep import FAILURE, Sweep, print_error

DESCRIPTION = """\
Compare methods in one table: tune each over its grid, then run it with several seeds, as runs of their own.

{command} comparison.yaml --dry-run
{command} comparison.yaml --output results/comparisons/inits

An interrupted comparison continues with the same command: finished runs are not run again.
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    command = command_name()
    made = argparse.ArgumentParser(
        prog=command,
        description=DESCRIPTION.format(command=command),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("comparison", type=Path, help="YAML file with methods, data and grids")
    add(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="override of every run, after those of the file, for example model.epochs=2",
    )
    add(
        "--test",
        action="append",
        default=[],
        metavar="key=value",
        help="override of the test data, after those of the file",
    )
    add("--only", action="append", metavar="METHOD", help="run only this method (may be repeated)")
    add("--output", type=Path, help="folder of the table (default: results/comparisons/<name of the file>)")
    add("--threads", type=int, help="torch threads (default: chosen by torch)")
    add("--dry-run", action="store_true", help="list the runs and estimate their time without running them")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, by default on sys.argv; return the exit code."""
    options = parser().parse_intermixed_args(arguments)
    sweep = Sweep()
    with sweep.job():
        return compare(options)
    return sweep.exit_code


def compare(options: argparse.Namespace) -> int:
    """Run or plan the comparison; return the exit code."""
    import torch

    from lora_one.runs import comparison, comparison_file
    from lora_one.runs.composition import compose
    from lora_one.runs.experiment import execute

    if options.threads:
        torch.set_num_threads(options.threads)
    read = comparison_file.read_comparison(options.comparison)
    common, test = [*read.common, *options.overrides], [*read.test, *options.test]
    chosen = dataclasses.replace(read, common=common, test=test).only(options.only)
    if options.dry_run:
        print(comparison.plan(chosen, compose))
        return 0
    output = options.output or Path("results/comparisons") / options.comparison.stem
    try:
        with caught():
            return 0 if comparison.compare(chosen, compose, execute, output) else FAILURE
    except Interrupted as stop:
        print_error(f"stopped by {stop}: the same command continues from the last resume point")
        return stop.exit_code
