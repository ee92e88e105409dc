"""Compare methods in one table: tune each over its grid, run it with several seeds, by ordinary runs of run_exp.py.

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
    add("comparison", type=Path, help="YAML file with the methods, the data and the grids")
    add(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="overrides of every run, after those of the file, such as model.epochs=2",
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
    import torch

    from lora_one.runs import cli, comparison, comparison_file
    from lora_one.runs.experiment import execute
    from lora_one.runs.sweep import FAILURE, INTERRUPTED, say_error

    if options.threads:
        torch.set_num_threads(options.threads)
    asked = comparison_file.read_comparison(options.comparison)
    asked = dataclasses.replace(
        asked, common=[*asked.common, *options.overrides], test=[*asked.test, *options.test]
    ).only(options.only)
    compose = partial(cli.compose, ROOT / "conf")
    if options.dry_run:
        print(comparison.plan(asked, compose))
        return 0
    output = options.output or Path("results/comparisons") / options.comparison.stem
    try:
        return 0 if comparison.compare(asked, compose, execute, output) else FAILURE
    except KeyboardInterrupt:
        say_error("interrupted: the same command goes on")
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
