"""The runs of a comparison in this process, one after another, and what is measured of them."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lora_one.config import RunConfig
from lora_one.errors import reason_of
from lora_one.evaluation.held_out import HeldOut
from lora_one.models.peak_memory import free_memory
from lora_one.progress import duration
from lora_one.records.folder import RunFolder
from lora_one.reports.compare import Run
from lora_one.reports.measurements import measurements
from lora_one.runs.comparison_evaluations import epoch_scores, scored, scores_of
from lora_one.runs.comparison_file import Evaluation
from lora_one.runs.comparison_jobs import Job, Jobs
from lora_one.runs.comparison_scores import evaluated

UNTRAINED = 0.25  # of a run with training: the start and the evaluations; about that of MiniLM-L6 on RTE
Execute = Callable[[RunConfig], object]


class Runner(Protocol):
    """Does jobs that are not finished."""

    def begin(self, jobs: Jobs, trained: int, untrained: int) -> None:
        """Set the comparison, and how many runs with and without training are left, for the estimate of the time."""

    def run(self, jobs: Sequence[Job], *, measured: bool) -> list[Run]:
        """Return the result of each job, in their order: its measurements or its error.

        measured: also the test loss and the evaluations of the comparison.
        """

    def end(self) -> None:
        """Free what the runs used; called in any case, also after an error."""


@dataclass(frozen=True)
class Measures:
    """What is measured of the chosen points: the loss on the test split, and the scores of the evaluations."""

    held_out: HeldOut
    evaluations: Mapping[str, Evaluation]

    @classmethod
    def of(cls, jobs: Jobs) -> "Measures":
        """Return the measures of a comparison."""
        return cls(held_out_of(jobs), evaluated(jobs.comparison.evaluations))

    def __call__(self, folder: RunFolder) -> dict[str, Any]:
        """Return the fields of ``Run`` that are measured after a run."""
        return {
            "test_loss": self.held_out(folder.path / "eval", folder.trained),
            "scores": scores_of(folder, self.evaluations),
            "epoch_scores": epoch_scores(folder, self.evaluations),
        }

    def done(self, folder: RunFolder) -> bool:
        """Return whether all of it was measured before."""
        return self.held_out.file(folder.path / "eval").exists() and scored(folder, self.evaluations)


def held_out_of(jobs: Jobs) -> HeldOut:
    """Return the test split of a comparison, unchecked."""
    comparison = jobs.comparison
    test = jobs.compose([*comparison.common, *comparison.test]).dataset
    return HeldOut(jobs.shared, test, comparison.test_examples)


class Pace:
    """Prints after each run how many are done, and how long the others will take.

    A run without training counts as the share of one with training that such runs have taken so far, before any as
    UNTRAINED of it.
    """

    def __init__(self, trained: int, untrained: int):
        self.left = {"trained": trained, "untrained": untrained}
        self.seconds: dict[str, list[float]] = {"trained": [], "untrained": []}
        self.total = trained + untrained
        self.began = time.monotonic()

    def add(self, job: Job, seconds: float) -> None:
        """Count a run that has ended."""
        kind = "untrained" if job.stage == "start" else "trained"
        self.left[kind] = max(0, self.left[kind] - 1)
        self.seconds[kind].append(seconds)
        print(f"comparison: {self.state()}", file=sys.stderr, flush=True)

    def state(self) -> str:
        """Return the number of runs that are done, the time since the beginning, and the estimated time left."""
        done = sum(map(len, self.seconds.values()))
        means = {kind: sum(each) / len(each) for kind, each in self.seconds.items() if each}
        whole = means.get("trained", next(iter(means.values())))
        weights = {kind: means[kind] / whole if kind in means and whole else UNTRAINED for kind in self.left}
        weights["trained"] = 1.0
        work = sum(weights[kind] * len(each) for kind, each in self.seconds.items())
        rest = sum(weights[kind] * number for kind, number in self.left.items())
        elapsed = time.monotonic() - self.began
        total = max(self.total, done)
        left = f", about {duration(elapsed * rest / work)} left" if rest and work else ""
        return f"{done} of {total} runs, {duration(elapsed)} elapsed{left}"


class InThisProcess:
    """Runs the jobs one after another in this process."""

    def __init__(self, execute: Execute):
        self.execute = execute

    def begin(self, jobs: Jobs, trained: int, untrained: int) -> None:
        self.pace, self.measures = Pace(trained, untrained), Measures.of(jobs)

    def run(self, jobs: Sequence[Job], *, measured: bool) -> list[Run]:
        return [self.one(job, self.measures if measured else None) for job in jobs]

    def end(self) -> None:
        """Nothing is left."""

    def one(self, job: Job, measure: Measures | None) -> Run:
        """Return the result of one job."""
        new, began = job.error is None and not job.finished, time.monotonic()
        found = attempt(job, self.execute, measure)
        if new:
            self.pace.add(job, time.monotonic() - began)
        return found


def attempt(job: Job, execute: Execute, measure: Measures | None = None) -> Run:
    """Run a job unless it is finished; return its measurements or its error."""
    error, found = job.error, {}
    if error is None:
        try:
            if not job.finished:
                print(f"\n== {job}: {job.folder.path}", flush=True)
                execute(job.config)
                free_memory()  # for the measurements, and for a server that an evaluation starts
            found = measure(job.folder) if measure else {}
        except Exception as failure:  # the next runs must not be lost
            error = reason_of(failure)
    return broken(job, error) if error is not None else finished(job, **found)


def broken(job: Job, error: str) -> Run:
    """Return a run without a result, and print its error."""
    print(f"failed: {job}: {error}", file=sys.stderr, flush=True)
    return without_result(job, error)


def without_result(job: Job, error: str) -> Run:
    """Return a run without a result."""
    path = str(job.folder.path) if job.folder else None
    return Run(job.method, job.stage, job.point, job.seed, path, error)


def finished(job: Job, **of_test_data: Any) -> Run:
    """Return a finished run with its measurements. of_test_data: the fields that ``Measures`` returns."""
    found = measurements(job.folder, job.folder.read())
    return Run(job.method, job.stage, job.point, job.seed, str(job.folder.path), **found, **of_test_data)
