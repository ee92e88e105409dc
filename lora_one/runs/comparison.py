"""Compare methods by ordinary runs: every grid point with the tuning seeds, then the best point with every seed.

The best point of a method has the lowest validation loss. The reported loss is on a separate test split, which is
evaluated only for the best points: without adapters, at the start (the same run with model.epochs=0) and after
training. Finished runs are not run again, so an interrupted comparison continues where it stopped.
"""

import gc
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_one.config import RunConfig
from lora_one.data import load_dataset
from lora_one.data.encoders import encoder_for
from lora_one.errors import RunError, UsageError
from lora_one.evaluation.held_out import HeldOut
from lora_one.files import read_lines
from lora_one.records.folder import RunFolder
from lora_one.reports import compare as table
from lora_one.reports.compare import Point, Run
from lora_one.reports.measurements import measurements
from lora_one.runs.comparison_evaluations import scores_of
from lora_one.runs.comparison_file import Comparison, Evaluation
from lora_one.runs.comparison_jobs import Compose, Job, Jobs, start_of
from lora_one.runs.comparison_record import save

Execute = Callable[[RunConfig], object]


@dataclass(frozen=True)
class Measures:
    """What is measured of the chosen points: the loss on the test split, and the scores of the evaluations."""

    held_out: HeldOut
    evaluations: Mapping[str, Evaluation]

    def __call__(self, folder: RunFolder) -> dict[str, Any]:
        """Return the fields of ``Run`` that are measured after a run."""
        return {
            "test_loss": self.held_out(folder.path / "eval", folder.trained),
            "scores": scores_of(folder, self.evaluations),
        }


def compare(comparison: Comparison, compose: Compose, execute: Execute, output: Path) -> dict[str, Any]:
    """Do all unfinished runs; write comparison.json and .csv to ``output``, and return the content of the former.

    A failed run is listed in the table and does not stop the others.
    Raises UsageError: the whole comparison is not possible.
    """
    jobs = Jobs(comparison, compose)
    held_out = held_out_data(comparison, jobs)
    pretrained = held_out(output / "eval")
    runs: list[Run] = []
    rows = []
    for method in comparison.methods:
        tuning, done, points = tuned(jobs, method, lambda job: attempt(job, execute))
        chosen = table.choose(points, done)
        if chosen is not None:
            measure = Measures(held_out, comparison.evaluations)
            done += measured(jobs.final(tuning, chosen), execute, measure)
        runs += done
        rows.append(table.method_row(method, done, chosen, points, pretrained, list(comparison.evaluations)))
    rows += [table.absent_row(method, reason) for method, reason in comparison.not_run.items()]
    return save(comparison, held_out, runs, rows, output)


def failed(record: Mapping[str, Any]) -> bool:
    """Return whether a run of the comparison, or an evaluation of one, failed."""
    scores = [score for run in record["runs"] for score in run["scores"].values()]
    return any(part.get("error") is not None for part in [*record["runs"], *scores])


def tuned(jobs: Jobs, method: str, run: Callable[[Job], Run | None]) -> tuple[list[Job], list[Run], list[Point]]:
    """Run every point of a method's grid, then the rounds of ``refine``; return its jobs, runs and points.

    run: None for a job that is not finished and is not to be run, which ends the tuning.
    """
    points: list[Point] = []
    tuning: list[Job] = []
    done: list[Run] = []
    new = table.grid_points(jobs.comparison.grid_of(method))
    for left in range(jobs.comparison.refine, -1, -1):
        points += new
        planned = jobs.tuning(method, new)
        tuning += planned
        found = [run(job) for job in planned]
        done += [one for one in found if one is not None]
        best = table.choose(points, done)
        if None in found or best is None or left == 0:
            break
        new = table.further_points(points, best)
    return tuning, done, points


def held_out_data(comparison: Comparison, jobs: Jobs) -> HeldOut:
    """Return the test split, on which the reported loss is computed.

    Raises UsageError: a test example is also a training or validation example, or there are no validation examples.
    """
    run = jobs.shared
    held_out = HeldOut(run, jobs.compose([*comparison.common, *comparison.test]).dataset, comparison.test_examples)
    splits = load_dataset(run.dataset, encoder_for(run.model, run.dataset), run.model.max_length)
    if not splits.validation:
        raise UsageError(
            "the comparison needs validation examples to choose the best point: raise dataset.validation_size in common"
        )
    seen = {example.prompt for example in [*splits.train_texts, *splits.validation_texts]}
    known = sum(example.prompt in seen for example in held_out.texts)
    if known:
        raise UsageError(
            f"{known} of the {len(held_out.texts)} test examples are also training or validation examples: select "
            "other data in test, for example dataset.path=<test file>"
        )
    return held_out


def measured(final: Sequence[Job], execute: Execute, measure: Measures) -> list[Run]:
    """Run each job with and without training, and measure both."""
    runs = []
    for job in final:
        runs.append(attempt(job, execute, measure))
        if runs[-1].error is None:
            runs.append(attempt(start_of(job), execute, measure))
    return runs


def attempt(job: Job, execute: Execute, measure: Measures | None = None) -> Run:
    """Run a job unless it is finished; return its measurements or its error."""
    error, found = job.error, {}
    if error is None:
        try:
            if not job.finished:
                print(f"\n== {job}: {job.folder.path}", flush=True)
                execute(job.config)
                gc.collect()  # a Trainer and its model reference each other; free them before the next run
            found = measure(job.folder) if measure else {}
        except (UsageError, RunError) as failure:
            error = str(failure)
        except Exception as failure:  # a bug, here or in a library: print where, and continue with the next run
            traceback.print_exc()
            error = f"{type(failure).__name__}: {failure}"
    if error is not None:
        print(f"failed: {job}: {error}", file=sys.stderr, flush=True)
        path = str(job.folder.path) if job.folder else None
        return Run(job.method, job.stage, job.point, job.seed, path, error)
    return finished(job, **found)


def finished(job: Job, **of_test_data: Any) -> Run:
    """Return a finished run with its measurements. of_test_data: the fields that ``Measures`` returns."""
    found = measurements(job.folder.read(), read_lines(job.folder.metrics))
    return Run(job.method, job.stage, job.point, job.seed, str(job.folder.path), **found, **of_test_data)


def plan(comparison: Comparison, compose: Compose) -> str:
    """List the runs that are known so far and estimate the remaining time, without running anything."""
    jobs = Jobs(comparison, compose)
    lines = []
    trained = untrained = 0  # numbers of runs still to do
    for method in comparison.methods:
        known, done, points = tuned(jobs, method, lambda job: finished(job) if job.finished else None)
        whole = len(table.grid_points(comparison.grid_of(method))) + 2 * comparison.refine
        rest = (whole - len(points)) * len(comparison.tuning_seeds)  # points that depend on runs still to do
        if all(job.finished for job in known) and not rest:
            chosen = table.choose(points, done)
            final = jobs.final(known, chosen)
            known += final + [start_of(job) for job in final if job.finished]
            untrained += sum(not job.finished for job in final)
        elif not any(job.error for job in known):
            further = len(set(comparison.seeds) - set(comparison.tuning_seeds))
            starts = len(comparison.seeds)
            rounds = f"then {rest} runs at further learning rates, " * bool(rest)
            lines.append(
                f"{method}: {rounds}then the best point (further seeds: {further}, runs without training: {starts})"
            )
            trained, untrained = trained + further + rest, untrained + starts
        lines += [describe(job) for job in known]
        missing = [job.stage for job in known if job.error is None and not job.finished]
        trained, untrained = trained + len(missing) - missing.count("start"), untrained + missing.count("start")
    lines += [f"{method}: not run yet: {reason}" for method, reason in comparison.not_run.items()]
    rate = comparison.seconds_per_run
    time = f", about {trained * rate / 60:.0f} minutes ({rate:g} s per run with training)" if rate is not None else ""
    return "\n".join([*lines, f"to do: {trained} runs with training and {untrained} without{time}"])


def describe(job: Job) -> str:
    """Return one line about a job: whether it is finished, and its folder or error."""
    if job.error is not None:
        return f"{job}: cannot run: {job.error}"
    return f"{job}: {'finished' if job.finished else 'to do'}, {job.folder.path}"
