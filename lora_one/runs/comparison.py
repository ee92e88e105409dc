"""Compare methods by ordinary runs: every grid point with the tuning seeds, then the best point with every seed.

The best point of a method has the lowest validation loss. The reported loss is on a separate test split, which is
evaluated only for the best points: without adapters, at the start (the same run with model.epochs=0) and after
training. Finished runs are not run again, so an interrupted comparison continues where it stopped.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from lora_one.data import load_dataset
from lora_one.data.encoders import encoder_for
from lora_one.errors import UsageError
from lora_one.evaluation.held_out import HeldOut
from lora_one.reports import compare as table
from lora_one.reports.compare import Point, Run
from lora_one.runs.comparison_file import Comparison
from lora_one.runs.comparison_jobs import Compose, Job, Jobs, start_of
from lora_one.runs.comparison_record import save
from lora_one.runs.comparison_runners import Runner, finished, held_out_of, without_result
from lora_one.runs.comparison_scores import absences, none_is_run

RunSome = Callable[[Sequence[Job]], Sequence[Run | None]]


@dataclass
class Tuning:
    """The tuning of one method so far: its points, the jobs at them, and what the finished ones measured.

    rounds: of further learning rates.  halvings: those of them between the neighbours of the best rate.
    """

    points: list[Point] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    complete: bool = True  # every job at these points has been run
    rounds: int = 0
    halvings: int = 0
    over: bool = False  # no further learning rates follow

    @property
    def chosen(self) -> Point | None:
        """Return the best point; None: there is none, or jobs are missing."""
        return table.choose(self.points, self.runs) if self.complete else None


def compare(comparison: Comparison, compose: Compose, runner: Runner, output: Path) -> dict[str, Any]:
    """Do all unfinished runs; write comparison.json and .csv to ``output``, and return the content of the former.

    All methods are tuned first, then their best points run with every seed, then the same without training.
    A failed run is listed in the table and does not stop the others.
    Raises UsageError: the whole comparison is not possible.
    """
    jobs = Jobs(comparison, compose)
    held_out = held_out_data(jobs)
    pretrained = held_out(output / "eval")
    try:
        runner.begin(jobs, *to_do(jobs, tuned(jobs, found_already)))
        tunings = tuned(jobs, lambda planned: runner.run(planned, measured=False))
        final = [job for method in tunings for job in final_jobs(jobs, method, tunings[method])]
        trained = runner.run(final, measured=True)
        starts = [start_of(job) for job, run in zip(final, trained, strict=True) if run.error is None]
        measured = [*trained, *runner.run(starts, measured=True)]
    finally:
        runner.end()
    rows, runs = [], []
    for method, tuning in tunings.items():
        done = [*tuning.runs, *(run for run in measured if run.method == method)]
        evaluations = list(comparison.evaluations)
        rows.append(table.method_row(method, done, tuning.chosen, tuning.points, pretrained, evaluations))
        runs += done
    rows += [table.absent_row(method, reason) for method, reason in comparison.not_run.items()]
    return save(comparison, held_out, runs, rows, output)


def failed(record: Mapping[str, Any]) -> bool:
    """Return whether a run of the comparison, or an evaluation of one, failed."""
    scores = [score for run in record["runs"] for score in run["scores"].values()]
    return any(part.get("error") is not None for part in [*record["runs"], *scores])


def tuned(jobs: Jobs, run: RunSome) -> dict[str, Tuning]:
    """Run every point of every method's grid, then the rounds of further rates; return method -> its tuning.

    A round gives every method two more rates. There are ``refine`` rounds, and at most ``extend`` more until the best
    rate of each method had ``refine`` of its rounds between neighbours, instead of beyond an end.
    run: returns one result for each job; None: it is not finished and is not to be run, which ends the tuning.
    """
    comparison = jobs.comparison
    tunings = {method: Tuning() for method in comparison.methods}
    new = {method: table.grid_points(comparison.grid_of(method)) for method in comparison.methods}
    while new:
        # the methods in turn: the runs of one start, which init.cache computes once, are then not side by side
        turns = zip_longest(*(jobs.tuning(method, points) for method, points in new.items()))
        planned = [job for turn in turns for job in turn if job is not None]
        found = run(planned)
        for method, points in new.items():
            own = [(job, one) for job, one in zip(planned, found, strict=True) if job.method == method]
            tuning = tunings[method]
            tuning.points += points
            tuning.jobs += [job for job, _ in own]
            tuning.runs += [one for _, one in own if one is not None]
            tuning.complete = all(one is not None for _, one in own)
        new = next_round(comparison, tunings, list(new))
    return tunings


def next_round(
    comparison: Comparison, tunings: Mapping[str, Tuning], methods: Sequence[str]
) -> dict[str, Sequence[Point]]:
    """Return the further points of these methods, which were in the last round; {}: no round follows.

    Without all results only the rounds are known that take place in any case.
    """
    best = {method: tunings[method].chosen for method in methods if tunings[method].complete}
    complete = all(tuning.complete for tuning in tunings.values())
    settled = all(tunings[method].halvings >= comparison.refine for method, point in best.items() if point)
    rounds = tunings[methods[0]].rounds
    most = comparison.refine + (comparison.extend if comparison.refine else 0)
    last = rounds == most or (complete and settled)
    for method, point in best.items():
        tunings[method].over = last or point is None
    if last or (rounds >= comparison.refine and not complete):
        return {}
    new = {}
    for method, point in best.items():
        if point is not None:
            tuning = tunings[method]
            new[method] = table.further_points(tuning.points, point)
            tuning.rounds += 1
            tuning.halvings += not table.at_an_end(tuning.points, point)
    return new


def final_jobs(jobs: Jobs, method: str, tuning: Tuning) -> list[Job]:
    """Return the jobs of a method's best point with every seed; [] if it has none."""
    return jobs.final(method, tuning.chosen) if tuning.chosen is not None else []


def held_out_data(jobs: Jobs) -> HeldOut:
    """Return the test split, on which the reported loss is computed.

    Raises UsageError: a test example is also a training or validation example, or there are no validation examples.
    """
    run = jobs.shared
    held_out = held_out_of(jobs)
    splits = load_dataset(run.dataset, encoder_for(run.model, run.dataset), run.model.max_length)
    if not splits.validation:
        raise UsageError(
            "the comparison needs validation examples to choose the best point: raise dataset.validation_size in common"
        )
    tested = {example.prompt for example in held_out.texts}
    used = chain(splits.train_texts, splits.validation_texts)
    seen = {example.prompt for example in used if example.prompt in tested}
    known = sum(example.prompt in seen for example in held_out.texts)
    if known and jobs.comparison.overlap is None:
        raise UsageError(
            f"{known} of the {len(held_out.texts)} test examples are also training or validation examples: select "
            "other data in test, for example dataset.path=<test file>, or say in overlap: <reason> why they may be, "
            "which is printed with the results"
        )
    held_out.counts["seen"] = known
    return held_out


def plan(comparison: Comparison, compose: Compose) -> str:
    """List the runs that are known so far and estimate the remaining time, without running anything."""
    lines = absences(comparison.evaluations)
    if none_is_run(comparison.evaluations):
        return "\n".join(lines)
    jobs = Jobs(comparison, compose)
    tunings = tuned(jobs, found_already)
    for method, tuning in tunings.items():
        known = [*tuning.jobs, *later_jobs(jobs, method, tuning)]
        if (tuning.chosen is None or not tuning.over) and not all(job.error for job in known):
            further = len(set(comparison.seeds) - set(comparison.tuning_seeds))
            then = f"{rounds_left(comparison, tuning)}then the best point"
            lines.append(f"{method}: {then} (further seeds: {further}, runs without training: {len(comparison.seeds)})")
        lines += [describe(job) for job in known]
    lines += [f"{method}: not run yet: {reason}" for method, reason in comparison.not_run.items()]
    trained, untrained = to_do(jobs, tunings)
    rate = comparison.seconds_per_run
    time = f", about {trained * rate / 60:.0f} minutes ({rate:g} s per run with training)" if rate is not None else ""
    return "\n".join([*lines, f"to do: {trained} runs with training and {untrained} without{time}"])


def rounds_left(comparison: Comparison, tuning: Tuning) -> str:
    """Return what a plan says of the further learning rates that are not known yet."""
    if tuning.over or not comparison.refine:
        return ""
    least = further_runs(comparison, tuning)
    if not least:
        return "then perhaps runs at further learning rates, "
    return f"then {least}{' or more' if comparison.extend else ''} runs at further learning rates, "


def to_do(jobs: Jobs, tunings: Mapping[str, Tuning]) -> tuple[int, int]:
    """Return how many runs with and without training are left, those included whose point is not known yet.

    tunings: as far as they are finished.
    """
    comparison = jobs.comparison
    trained = untrained = 0
    for method, tuning in tunings.items():
        trained += sum(not job.finished for job in tuning.jobs if job.error is None)
        if all(job.error for job in tuning.jobs):
            continue
        trained += further_runs(comparison, tuning)
        if tuning.chosen is None or not tuning.over:
            trained += len(set(comparison.seeds) - set(comparison.tuning_seeds))
            untrained += len(comparison.seeds)
            continue
        final = final_jobs(jobs, method, tuning)
        trained += sum(not job.finished for job in final)
        untrained += sum(not (job.finished and start_of(job).finished) for job in final)
    return trained, untrained


def found_already(planned: Sequence[Job]) -> list[Run | None]:
    """Return the finished ones of the jobs, and those that failed or cannot run, as they are; None for the others."""
    return [finished(job) if job.finished else failed_before(job) for job in planned]


def failed_before(job: Job) -> Run | None:
    """Return a job that cannot run, or that failed before and may fail again; None: it has not been run to its end."""
    error = job.error
    if error is None:
        record = job.folder.read()
        error = record.get("error") if record.get("status") == "failed" else None
    return None if error is None else without_result(job, error)


def further_runs(comparison: Comparison, tuning: Tuning) -> int:
    """Return the number of tuning runs, at least, at points that depend on runs still to do."""
    rounds = 0 if tuning.over else max(0, comparison.refine - tuning.rounds)
    return 2 * rounds * len(comparison.tuning_seeds)


def later_jobs(jobs: Jobs, method: str, tuning: Tuning) -> Iterator[Job]:
    """Yield the jobs after the tuning whose configuration is known."""
    if tuning.over:
        final = final_jobs(jobs, method, tuning)
        yield from final
        yield from (start_of(job) for job in final if job.finished)


def describe(job: Job) -> str:
    """Return one line about a job: whether it is finished, and its folder or error."""
    if job.error is not None:
        return f"{job}: cannot run: {job.error}"
    return f"{job}: {'finished' if job.finished else 'to do'}, {job.folder.path}"
