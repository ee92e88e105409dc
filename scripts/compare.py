"""Compare methods in one table: tune each over its grid, then run it with several seeds, as runs of run_exp.py.

python scripts/compare.py scripts/comparisons/inits_stories_gsm8k.yaml --dry-run
python scripts/compare.py scripts/comparisons/inits_stories_gsm8k.yaml --output results/comparisons/inits

An interrupted comparison continues with the same command: finished runs are not run again.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run_exp.py is not part of the package


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
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
    options = parser.parse_intermixed_args(arguments)

    from lora_one.runs.sweep import Sweep

    sweep = Sweep()
    with sweep.job():
        return compare(options)
    return sweep.exit_code


def compare(options: argparse.Namespace) -> int:
    """Run or plan the comparison; return the exit code."""
    import torch

    from lora_one.runs import cli, comparison, comparison_file
    from lora_one.runs.experiment import execute
    from lora_one.runs.sweep import FAILURE, INTERRUPTED, print_error

    if options.threads:
        torch.set_num_threads(options.threads)
    read = comparison_file.read_comparison(options.comparison)
    common, test = [*read.common, *options.overrides], [*read.test, *options.test]
    chosen = dataclasses.replace(read, common=common, test=test).only(options.only)
    compose = partial(cli.compose, ROOT / "conf")
    if options.dry_run:
        print(comparison.plan(chosen, compose))
        return 0
    output = options.output or Path("results/comparisons") / options.comparison.stem
    try:
        return 0 if comparison.compare(chosen, compose, execute, output) else FAILURE
    except KeyboardInterrupt:
        print_error("interrupted: the same command continues")
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
