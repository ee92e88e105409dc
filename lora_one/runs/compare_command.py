"""The command ``lora-one-compare`` (scripts/compare.py): run the comparison that a YAML file describes."""

import argparse
import dataclasses
import hashlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_one.errors import UsageError, nearest
from lora_one.invocation import Parser, command_name
from lora_one.progress import processes_started
from lora_one.runs.sweep import FAILURE, run_command

if TYPE_CHECKING:
    from lora_one.runs.comparison_file import Comparison
    from lora_one.runs.comparison_runners import Runner

LONGEST = 100  # characters of a folder's name
DESCRIPTION = """\
Compare methods in one table: tune each over its grid, then run it with several seeds, as runs of their own.

{command} comparison.yaml --dry-run
{command} comparison.yaml --output results/comparisons/inits
{command} comparison.yaml --small
{command} --runs results/<...>/<one configuration> results/<...>/<another one>
{command} --predictions one/predictions.jsonl other/predictions.jsonl

An interrupted comparison continues with the same command: finished runs are not run again.
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    command = command_name()
    made = Parser(
        prog=command,
        description=DESCRIPTION.format(command=command),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("comparison", type=Path, nargs="?", help="YAML file with methods, data and grids")
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
    add("--task", action="append", metavar="TASK", help="run only this task of the file (may be repeated)")
    add("--only", action="append", metavar="METHOD", help="run only this method (may be repeated)")
    add("--output", type=Path, help="folder of the table (default: in <results_dir>/comparisons, by file and choices)")
    add("--threads", type=int, help="torch threads of a run (default: chosen by torch; with --jobs: all cores shared)")
    add("--jobs", type=int, metavar="N", help="runs side by side on this machine, instead of the file's (default: 1)")
    add("--launcher", choices=["slurm"], help="submit the runs as arrays of SLURM jobs; see the key slurm of the file")
    add(
        "--runs",
        nargs=2,
        type=Path,
        metavar=("A", "B"),
        help="without a file: test two finished runs, or two configurations with their seeds, B being the baseline",
    )
    add(
        "--predictions",
        nargs=2,
        type=Path,
        metavar=("A", "B"),
        help="without a file: test two predictions.jsonl (or samples of lm_eval) of the same questions",
    )
    add("--metric", help="with --predictions: the field that says whether an answer is correct")
    add("--filter", help="with --predictions: which of lm_eval's filters, if the files have several")
    add("--small", action="store_true", help="run the small trial that the key small of the file describes")
    add(
        "--curvature",
        type=int,
        metavar="N",
        help="instead of the comparison: the largest eigenvalue of the Hessian at the start of every method, on N "
        "training examples, and the learning rates that it suggests; its runs lie in <results_dir>/curvature",
    )
    add(
        "--dry-run",
        action="store_true",
        help="list the runs without running them; with seconds_per_run in the file, estimate their time",
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, by default on sys.argv; return the exit code."""
    options = parser().parse_intermixed_args(arguments)
    return run_command(lambda: compare(options), "continues from the last resume point")


def compare(options: argparse.Namespace) -> int:
    """Run or plan the comparison; return the exit code."""
    if options.predictions or options.runs:
        if options.comparison is not None:
            raise UsageError(f"{options.comparison} is not used with --runs or --predictions: leave one of them out")
        from lora_one.reports import pairs

        if options.predictions:
            print(pairs.compare_predictions(*options.predictions, options.metric, options.filter))
        if options.runs:
            print(pairs.compare_runs(*options.runs))
        return 0
    if options.comparison is None:
        raise UsageError("nothing to compare: pass the YAML file of a comparison, --runs A B or --predictions A B")
    refuse_beside_curvature(options)
    if processes_started() > 1:
        raise UsageError("a comparison starts its own processes: start the command alone, without srun or torchrun")
    import torch

    from lora_one.files import folder_name
    from lora_one.reports import pages
    from lora_one.runs import comparison, comparison_curvature, comparison_file, comparison_record
    from lora_one.runs.comparison_scores import absences, none_is_run
    from lora_one.runs.composition import compose
    from lora_one.runs.experiment import execute

    if options.threads:
        torch.set_num_threads(options.threads)
    tasks = chosen_tasks(comparison_file.read_comparisons(options.comparison, small=options.small), options)
    if options.dry_run:
        for task, chosen in tasks.items():
            print(f"== {task}" * bool(task) + "\n" * bool(task) + comparison.plan(chosen, compose))
        return 0
    if options.curvature is not None:
        tables = {}
        for task, chosen in tasks.items():
            if none_is_run(chosen.evaluations):
                print("\n".join(["", *[task] * bool(task), *absences(chosen.evaluations)]))
                continue
            table = tables[task] = comparison_curvature.curvature(chosen, compose, execute, options.curvature)
            print(f"\n{task or chosen.title}\n\n{table.text}")
        return FAILURE if tables and not any(table.measured for table in tables.values()) else 0
    first = next(iter(tasks))
    results_dir = compose(tasks[first].common).results_dir
    output = options.output or default_output(options, results_dir)
    title = tasks[first].title.removesuffix(f": {first}")
    print(f"comparison: its results will be in {output}", file=sys.stderr, flush=True)
    records = {}
    for task, chosen in tasks.items():
        place = output / folder_name(task)
        if none_is_run(chosen.evaluations):
            records[task] = comparison_record.save_without_runs(chosen, place)
        else:
            records[task] = comparison.compare(chosen, compose, runner_of(chosen, place, options.threads), place)
        report = pages.write_report(title, records, output)
        print(f"\n{pages.printed(records[task])}\nreport: {report.with_suffix('.html')}")
    return FAILURE if any(map(comparison.failed, records.values())) else 0


def default_output(options: argparse.Namespace, results_dir: str = "results") -> Path:
    """Return the folder of the table. A part of the comparison does not replace the whole one, nor do other settings.

    Overrides, and the methods of --only, whose names may share a folder's name, are told apart by a hash.
    """
    from lora_one.files import folder_name

    parts = [folder_name(name) for name in (*(options.task or ()), *sorted(options.only or ()))]
    name = "-".join([options.comparison.stem, *["small"] * options.small, *parts])
    kept = (text for text in options.overrides if not text.startswith("results_dir="))  # it is part of the path
    choices = [sorted(kept), sorted(options.test), sorted(options.only or ())]
    if any(choices) or len(name) > LONGEST:
        name = f"{name[:LONGEST]}-{hashlib.sha256(str([name, *choices]).encode()).hexdigest()[:8]}"
    return Path(results_dir) / "comparisons" / name


def refuse_beside_curvature(options: argparse.Namespace) -> None:
    """Raise UsageError if --curvature is out of range, or if an option is given that it does not read."""
    if options.curvature is None:
        return
    if options.curvature < 1:
        raise UsageError(
            f"--curvature={options.curvature} is out of range: it must be a number of examples, at least 1; without it "
            "the comparison runs"
        )
    for name in ("dry_run", "output", "jobs", "launcher"):
        if getattr(options, name):
            raise UsageError(
                f"--{name.replace('_', '-')} is not used with --curvature, which measures one method after another in "
                "this process and only prints: remove one of the two"
            )


def runner_of(chosen: "Comparison", output: Path, threads: int | None) -> "Runner":
    """Return what does the runs: this process, others beside it, or SLURM. Raises UsageError: submitit is missing."""
    from lora_one.runs.comparison_array import SlurmArray
    from lora_one.runs.comparison_file import slurm_defaults
    from lora_one.runs.comparison_runners import InThisProcess
    from lora_one.runs.comparison_workers import SideBySide
    from lora_one.runs.experiment import execute

    if chosen.launcher == "slurm":
        if not importlib.util.find_spec("submitit"):
            raise UsageError("launcher=slurm needs submitit: pip install 'lora-one[slurm]'")
        return SlurmArray(output, slurm_defaults() | chosen.slurm)
    return InThisProcess(execute) if chosen.jobs == 1 else SideBySide(output, chosen.jobs, threads)


def check_overrides(task: "Comparison", overrides: Sequence[str], *, grid: bool) -> None:
    """Raise UsageError if an override has no effect, because a method, or the grid if it is used, sets its key later.

    Keys are compared in Hydra's spelling.
    """
    from lora_one.runs.overrides import translate

    def key_of(override: str) -> str:
        return translate([override])[0].partition("=")[0].lstrip("+~")

    for override in overrides:
        key = key_of(override)
        for method, own in task.methods.items():
            if grid and key in task.grid_of(method):
                raise UsageError(f"{override} has no effect: {key} is in the grid of {method}; change it in the file")
            if key in map(key_of, own):
                raise UsageError(f"{override} has no effect on {method}, which sets {key}: change it in the file")


def chosen_tasks(tasks: dict[str, "Comparison"], options: argparse.Namespace) -> dict[str, "Comparison"]:
    """Return the tasks to run, with the options of the command. Raises UsageError: one of them is not valid."""
    from lora_one.runs.comparison_file import check_launcher

    for name in options.task or ():
        if name not in tasks or not name:
            raise UsageError(
                f"--task={name} is not a task of this comparison; {nearest(name, [t for t in tasks if t])}"
            )
    given = {"jobs": options.jobs, "launcher": options.launcher}
    given = {key: value for key, value in given.items() if value is not None}
    chosen = {name: dataclasses.replace(tasks[name], **given) for name in options.task or tasks}
    for task in chosen.values():
        check_launcher(task)
    found = {}
    for name, task in chosen.items():
        common, test = [*task.common, *options.overrides], [*task.test, *options.test]
        found[name] = dataclasses.replace(task, common=common, test=test).only(options.only)
        check_overrides(found[name], options.overrides, grid=options.curvature is None)
    return found
