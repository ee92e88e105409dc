"""Progress of a long stage: a bar on a terminal, elsewhere a line now and then. It has no effect on results."""

import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

QUIET = 2.0  # seconds; a shorter stage prints nothing
TOGETHER = 0.05  # seconds; parts that end within this time after each other are one batch
EVERY = 10.0  # seconds between two lines off a terminal, at least; in long stages 1 % of the time elapsed


def first_process() -> bool:
    """Return whether this is the first of the processes that a launcher has started, the one that prints and writes."""
    of_srun = os.environ.get("SLURM_PROCID", "0") if tasks_of_srun(os.environ) > 1 else "0"  # before RANK is set
    return os.environ.get("RANK", of_srun) == "0"


def processes_started() -> int:
    """Return the number of processes that a launcher or srun has started for this command."""
    return max(int(os.environ.get("WORLD_SIZE", "1")), tasks_of_srun(os.environ))


def tasks_of_srun(environment: Mapping[str, str]) -> int:
    """Return the number of tasks of the srun that this process is part of; 1 without srun.

    A command in the shell of ``srun --ntasks=4 --pty bash`` is alone, although its variables name four tasks: the other
    shells have no terminal and have ended.
    """
    in_a_shell = os.isatty(0) and environment.get("SLURM_TASK_PID") != str(os.getpid())
    return 1 if in_a_shell else int(environment.get("SLURM_STEP_NUM_TASKS", "1"))


def first_of_node() -> bool:
    """Return whether this is the first of the processes on its machine."""
    return os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0"


class Progress:
    """Counts the finished parts of a stage, and shows them with elapsed and remaining time on stderr.

    total: number of parts; more may follow.  done: parts that were finished before, in a resumed run.
    Only the first of several processes prints. If parts end in batches, a line is about whole batches, because the
    first part of a batch took as long as all of it.
    """

    def __init__(self, stage: str, total: int, unit: str, done: int = 0):
        self.stage, self.total, self.unit = stage, total, unit
        self.before = self.done = done
        self.facts: dict[str, str] = {}
        self.began = self.last = time.monotonic()  # last: end of the part that ended last
        self.batch = 0  # parts of the batch under way
        self.due = self.began + QUIET  # of the next line
        self.lines = 0
        self.active = first_process()
        self.bar: Any = None
        if self.active and sys.stderr.isatty() and shutil.get_terminal_size().columns > 0:
            from tqdm import tqdm

            shown = {"desc": stage, "unit": f" {unit}", "initial": done, "dynamic_ncols": True}
            self.bar = tqdm(total=total, file=sys.stderr, delay=QUIET, leave=False, **shown)

    def advance(self, parts: int = 1, **facts: str) -> None:
        """Count finished parts. facts: what is shown after the times, for example loss="1.234"; the last ones stay."""
        now, before, last_batch = time.monotonic(), (self.done, self.last), self.batch
        begins = last_batch == 0 or now - self.last > TOGETHER
        self.batch = 1 if begins else last_batch + 1
        self.done, self.last = self.done + parts, now
        self.total = max(self.total, self.done)
        self.facts |= facts
        if self.bar is not None:
            self.bar.total = self.total
            self.bar.set_postfix(self.facts, refresh=False)
            self.bar.update(parts)
        elif self.active and begins and now >= self.due and self.done < self.total:
            self.print_line(*(before if last_batch > 1 else (self.done, now)), estimate=last_batch > 0)

    def print_line(self, done: int, now: float, estimate: bool) -> None:
        """Print the state of the stage at a time, and set the time of the next line. estimate: of the time left."""
        elapsed = now - self.began
        left = elapsed * (self.total - done) / max(1, done - self.before)
        parts = [f"{done} of {self.total} {self.unit} ({100 * done // self.total} %)"]
        parts += [f"{duration(elapsed)} elapsed", *([f"about {duration(left)} left"] if estimate else [])]
        self.note(", ".join([f"{self.stage}: {parts[0]}", *parts[1:], *map(" ".join, self.facts.items())]))
        self.due, self.lines = now + max(EVERY, elapsed / 100), self.lines + 1

    def note(self, text: str) -> None:
        """Print a line of text, above the bar if there is one."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        elif self.active:
            print(text, file=sys.stderr, flush=True)

    def finish(self) -> None:
        """If lines were printed, print how long the stage took."""
        if self.lines:
            self.note(f"{self.stage}: {self.done} {self.unit} in {duration(time.monotonic() - self.began)}")

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()


@contextmanager
def progress(stage: str, total: int, unit: str, done: int = 0) -> Iterator[Progress]:
    """Show the progress of a stage within the block, which calls ``advance``."""
    shown = Progress(stage, total, unit, done)
    try:
        yield shown
        shown.finish()
    finally:
        shown.close()


def duration(seconds: float) -> str:
    """Return a time as minutes and seconds, or hours, minutes and seconds.

    >>> duration(75), duration(3 * 3600 + 62)
    ('1:15', '3:01:02')
    """
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
