"""The jobs of one command: their results, and their errors as one line each with an exit code."""

import gc
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

from lora_one.config import RunConfig
from lora_one.errors import RunError, UsageError
from lora_one.records.folder import RunFolder, first_process

USAGE, FAILURE, INTERRUPTED = 2, 1, 130


@dataclass(frozen=True)
class Outcome:
    """Result of a job that ran in another process: its exit code and the folders of the runs it finished."""

    code: int
    done: tuple[Path, ...]


@dataclass
class Sweep:
    """Results of the jobs of one command, collected one after another; a single run is a sweep of one job.

    failures: exit codes of the failed jobs.  done: folders of the finished runs.
    overwriting: a job has overwrite=true, so SLURM must not start the command again.
    tracebacks: print the traceback of every error too.
    """

    failures: list[int] = field(default_factory=list)
    done: list[RunFolder] = field(default_factory=list)
    overwriting: bool = False
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

    @property
    def exit_code(self) -> int:
        """0, or the highest exit code of the failed jobs."""
        return max(self.failures, default=0)

    @property
    def outcome(self) -> Outcome:
        """Return the results so far, to be sent to another process."""
        return Outcome(self.exit_code, tuple(folder.path for folder in self.done))

    def begin(self, run: RunConfig) -> None:
        """Record what a signal handler must know about a job that starts."""
        self.overwriting = self.overwriting or run.overwrite

    def add(self, folder: RunFolder | None) -> None:
        """Add the folder of a finished run; None, from a dry run, is ignored."""
        if folder is not None:
            self.done.append(folder)

    def add_outcome(self, outcome: Outcome) -> None:
        """Add the result of a job that ran in another process."""
        self.failures.append(outcome.code)
        self.done.extend(map(RunFolder, outcome.done))

    @contextmanager
    def job(self) -> Iterator[None]:
        """Run one job within the block: an error is printed on one line and counted, and the sweep continues."""
        gc.collect()  # the model and the trainer of the previous job reference each other
        if "torch" in sys.modules:
            sys.modules["torch"].cuda.empty_cache()
        try:
            yield
        except UsageError as error:
            self.fail(str(error), USAGE)
        except RunError as error:
            self.fail(str(error), FAILURE)
            _end_with_the_others()
        except Exception as error:  # a bug, here or in a library: print where it is
            if not self.tracebacks:
                traceback.print_exc()
            self.fail(f"{type(error).__name__}: {error}", FAILURE)
            _end_with_the_others()

    def fail(self, message: str, code: int) -> None:
        """Record a failed job, and print its error."""
        self.failures.append(code)
        if self.tracebacks:
            traceback.print_exc()
        print_error(message)

    def close(self) -> None:
        """Print a table of the finished runs, if there are several, and write it to their results_dir."""
        if len(self.done) < 2 or not first_process():
            return
        from lora_one.reports.table import save_sweep, sweep_table

        runs = list({folder.path: folder.read() for folder in self.done}.items())
        print("\n" + sweep_table(runs))
        results = self.done[0].path.parents[2]
        try:
            path = save_sweep([(path, record) for path, record in runs if path.is_relative_to(results)], results)
        except OSError as error:
            reason = f"the table of the sweep cannot be written to {results} ({error.strerror})"
            self.fail(f"{reason}: free disk space, or make the folder writable", FAILURE)
        else:
            print(f"table: {path} and {path.with_suffix('.csv').name}")


_current: ContextVar[Sweep | None] = ContextVar("sweep", default=None)


def print_error(message: str) -> None:
    """Print an error on one line of stderr; only the first process prints."""
    if first_process():
        print(f"error: {' '.join(message.splitlines())}", file=sys.stderr, flush=True)


def _end_with_the_others() -> None:
    """End this process if it is one of several: the others wait for it, so no further job can run."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SystemExit(FAILURE)
