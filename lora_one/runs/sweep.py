"""The jobs of one command: their results, and their errors as one line each with an exit code."""

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

from lora_one.config import RunConfig
from lora_one.errors import RunError, UsageError
from lora_one.files import full_disk
from lora_one.interruption import Interrupted, caught
from lora_one.peers import failed, lost_connection, print_error, print_line
from lora_one.progress import duration, first_process
from lora_one.records.folder import RunFolder
from lora_one.runs.planned_jobs import Differing, by_key, differing

USAGE, FAILURE, INTERRUPTED = 2, 1, 130


@dataclass(frozen=True)
class Outcome:
    """Result of a job that ran in another process: its exit code, the folders of the runs it finished, its error."""

    code: int
    done: tuple[Path, ...]
    error: str | None = None


@dataclass
class Job:
    """One job of a command.

    overrides: those of the command line, by key; {}: unknown.  name: the overrides that differ between jobs, and the
    seed.  folder: of the finished run.  error: why there is no result.
    """

    overrides: dict[str, str] = field(default_factory=dict)
    name: str = ""
    folder: RunFolder | None = None
    error: str | None = None
    ended: bool = False  # also without a folder, as a dry run

    @property
    def left(self) -> bool:
        """Return whether the job has not ended."""
        return not self.ended and self.folder is None and self.error is None


@dataclass
class Sweep:
    """Results of the jobs of one command, collected one after another; a single run is a sweep of one job.

    jobs: all jobs that are planned or have started.  several: the command is a sweep.  planned: ``jobs`` has all of
    its jobs.  started: what differs between those that have started without a plan.  over: the positions of the jobs
    that are not left.  seconds, timed: the sum over the jobs that ran here, and their number.
    current_job: the position of the one that started last; -1: none.
    job_began: its start, in seconds as of time.time().
    failures: exit codes of the failed jobs.
    overwriting: a job has overwrite=true, so SLURM must not start the command again.
    dry: the current job only prints its plan.
    tracebacks: print the traceback of every error too.
    """

    jobs: list[Job] = field(default_factory=list)
    several: bool = False
    planned: bool = False
    started: Differing = field(default_factory=Differing)
    over: set[int] = field(default_factory=set)
    seconds: float = 0.0
    timed: int = 0
    current_job: int = -1
    job_began: float = 0.0
    failures: list[int] = field(default_factory=list)
    overwriting: bool = False
    dry: bool = False
    tracebacks: bool = False

    @staticmethod
    def current() -> "Sweep":
        """Return the sweep of the running command; Hydra passes no arguments to a job."""
        sweep = _current.get()
        if sweep is None:  # not started by cli.launch, but by another launcher of Hydra, for example
            sweep = Sweep()
            _current.set(sweep)
        return sweep

    @contextmanager
    def running(self) -> Iterator[None]:
        """Make this the current sweep within the block."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def plan(self, overrides: Sequence[dict[str, str]], several: bool) -> None:
        """Set the planned jobs, by their overrides, in the order in which they will start.

        overrides: [] if they cannot be planned.  several: the command is a sweep.
        """
        self.several, self.planned = several, bool(overrides)
        keys = differing(overrides)
        for job in overrides:
            self.jobs.append(Job(job, name_of(job, keys)))

    def started_with(self, overrides: Sequence[str]) -> None:
        """Set the overrides of the job that starts, as Hydra gives them.

        If the plan has others, it is dropped: Hydra's sweep is another one, such as that of hydra.sweeper.params.
        """
        job, given = self.jobs[self.current_job], by_key(overrides)
        if self.planned and job.overrides == given:
            return
        if self.planned:
            self.planned = False
            self.jobs = self.jobs[: self.current_job + 1]
            for earlier in self.jobs[:-1]:
                self.started.add(earlier.overrides)
        self.started.add(given)
        job.overrides, job.name = given, name_of(given, self.started.keys)

    @property
    def done(self) -> list[RunFolder]:
        """Return the folders of the finished runs."""
        return [job.folder for job in self.jobs if job.folder is not None]

    @property
    def exit_code(self) -> int:
        """0, or the highest exit code of the failed jobs."""
        return max(self.failures, default=0)

    @property
    def outcome(self) -> Outcome:
        """Return the results so far, to be sent to another process."""
        error = next((job.error for job in self.jobs if job.error is not None), None)
        return Outcome(self.exit_code, tuple(folder.path for folder in self.done), error)

    def begin(self, run: RunConfig) -> None:
        """Record what a signal handler must know about a job that starts; print which of the jobs it is."""
        self.overwriting, self.dry = self.overwriting or run.overwrite, run.dry_run
        job = self.jobs[self.current_job]
        if not (self.several and first_process()):
            return
        name = job.name if "seed" in job.overrides else ", ".join(filter(None, [job.name, f"seed {run.seed}"]))
        number = f"job {self.current_job + 1}"
        if not self.planned:
            print(f"\n{number}: {name}", flush=True)
        elif len(self.jobs) > 1:
            print(f"\n{number} of {len(self.jobs)}: {name} ({self.remaining()})", flush=True)

    def remaining(self) -> str:
        """Return how many jobs are left, this one included, and their time, estimated from the jobs that ran here."""
        left = len(self.jobs) - len(self.over)
        return f"{left} left" + (f", about {duration(left * self.seconds / self.timed)}" if self.timed else "")

    def add(self, folder: RunFolder | None) -> None:
        """Add the folder of the current job's finished run; None, from a dry run, is ignored."""
        if folder is None:
            return
        job = self.jobs[self.current_job]
        job.folder = folder
        if folder.run_json.exists() and folder.run_json.stat().st_mtime >= self.job_began:  # not finished earlier
            self.seconds, self.timed = self.seconds + time.time() - self.job_began, self.timed + 1

    def add_outcome(self, outcome: Outcome) -> None:
        """Add the result of the current job, which ran in another process."""
        self.failures.append(outcome.code)
        job = self.jobs[self.current_job]
        job.folder = RunFolder(outcome.done[0]) if outcome.done else None
        job.error = outcome.error

    @contextmanager
    def job(self, number: int | None = None, *, checked_only: bool = False) -> Iterator[None]:
        """Run one job within the block: an error is printed on one line and counted, and the sweep continues.

        number: the position of the job among the planned ones; None: the next one.
        checked_only: without an error, the job is left.
        """
        self.current_job = self.current_job + 1 if number is None else number
        if self.current_job >= len(self.jobs):
            self.jobs.append(Job())
        self.job_began = time.time()
        with self.errors(self.jobs[self.current_job]):
            yield
            self.jobs[self.current_job].ended = not checked_only
        if not self.jobs[self.current_job].left:
            self.over.add(self.current_job)

    @contextmanager
    def errors(self, job: Job | None = None) -> Iterator[None]:
        """Print an error within the block on one line, and count it. job: the job that it is an error of."""
        try:
            yield
        except UsageError as error:
            self.fail(str(error), USAGE, job)
        except RunError as error:
            self.fail(str(error), FAILURE, job)
            _end_with_the_others()
        except Exception as error:
            known = lost_connection(error) or full_disk(error)
            if known is None and not self.tracebacks:  # a bug, here or in a library: print where it is
                traceback.print_exc()
            self.fail(known or f"{type(error).__name__}: {error}", FAILURE, job)
            _end_with_the_others()

    def fail(self, message: str, code: int, job: Job | None = None) -> None:
        """Record an error, of a job or of the whole command, and print it."""
        self.failures.append(code)
        if job is not None:
            job.error = message
            if len(self.jobs) > 1:
                message = f"job {self.current_job + 1}{f' ({job.name})' * bool(job.name)}: {message}"
        if self.tracebacks:
            traceback.print_exc()
        print_error(message)

    def print_state(self) -> None:
        """After an interruption, list the jobs that are finished, failed and left; nothing for a single run."""
        if len(self.jobs) < 2 or not first_process():
            return
        states = {"finished": [], "failed": [], "left": []}
        for number, job in enumerate(self.jobs, start=1):
            state = "left" if job.left else "failed" if job.error else "finished"
            states[state].append(f"  job {number}{f': {job.name}' * bool(job.name)}")
        for state, names in states.items():
            if names:
                print("\n".join([f"{state}, {len(names)} of {len(self.jobs)} jobs:", *names]), file=sys.stderr)

    def close(self) -> None:
        """Print a table of several jobs, if one of them is finished, and write it to their results_dir."""
        if len(self.jobs) < 2 or not self.done or not first_process():
            return
        from lora_one.runs.sweep_table import publish

        try:
            publish(self.jobs, self.done[0].path.parents[2])
        except OSError as error:
            reason = f"the table of the sweep cannot be written ({error.strerror})"
            self.fail(f"{reason}: free disk space, or make the folder {error.filename or ''} writable", FAILURE)


def name_of(overrides: dict[str, str], keys: Sequence[str]) -> str:
    """Return the overrides of these keys, and the seed."""
    parts = [f"{key}={overrides[key]}" for key in keys if key in overrides]
    parts += [f"seed {overrides['seed']}"] if "seed" in overrides else []
    return ", ".join(parts)


def run_command(work: Callable[[], int | None], continuation: str) -> int:
    """Do the work of a command, and return its exit code; errors and signals are printed as one line.

    work: returns its exit code; None: success.  continuation: what the same command does after a signal.
    """
    sweep = Sweep()
    try:
        with caught(), sweep.job():
            return work() or 0
    except Interrupted as stop:
        print_error_of_all(f"stopped by {stop}: the same command {continuation}")
        return stop.exit_code
    if sweep.exit_code:
        failed()
    return sweep.exit_code


_current: ContextVar[Sweep | None] = ContextVar("sweep", default=None)


def print_error_of_all(message: str) -> None:
    """Print an error or a signal that ends all processes; the first process prints."""
    if first_process():
        print_line(message)
    failed()


def _end_with_the_others() -> None:
    """End this process if it is one of several: the others wait for it, so no further job can run."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        failed()
        raise SystemExit(FAILURE)
