"""Ctrl-C, SIGTERM, SIGUSR1 and SIGUSR2 stop a run with a resume point; SLURM may requeue it.

SIGTERM announces preemption, SIGUSR1 and SIGUSR2 a time limit. A second Ctrl-C does not wait for the resume point.
"""

import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from lora_one.progress import first_process

WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)  # sent before a time limit, by #SBATCH --signal or by submitit (SIGUSR2)
SIGNALS = (signal.SIGINT, signal.SIGTERM, *WARNINGS)
RESTARTS_WITHOUT_PROGRESS = 3  # of a SLURM job that is queued again; caches may help the first of them
WAITING = "\nstopping after the step under way, with a resume point; press Ctrl-C again to stop at once\n"


@dataclass
class Signals:
    """Signals that this process received. A signal is sent to a process, so there is one such object."""

    received: list[int] = field(default_factory=list)  # since ``caught`` began
    deferring: int = 0  # number of open ``deferred`` blocks
    catching: int = 0  # number of open ``caught`` blocks
    progress_saved: bool = False  # since the outermost of them began


_signals = Signals()


class Interrupted(KeyboardInterrupt):
    """A signal asked the process to stop."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def exit_code(self) -> int:
        """Return 128 + the signal's number, as shells do."""
        return 128 + self.number


@contextmanager
def caught() -> Iterator[None]:
    """Raise Interrupted if a signal arrives within the block: at once, or at the end of a ``deferred`` block.

    A signal that the process ignores, as SIGINT in the background of a script, stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    _signals.progress_saved = _signals.progress_saved and _signals.catching > 0
    _signals.catching += 1
    handled = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, _on_signal) for number in handled}
    try:
        yield
    finally:
        _signals.catching -= 1
        for number, handler in before.items():
            signal.signal(number, handler)
        _signals.received.clear()


def _on_signal(number: int, frame: FrameType | None) -> None:
    state = _signals
    state.received.append(number)
    if state.received.count(signal.SIGINT) > 1 and number == signal.SIGINT:
        signal.signal(number, signal.SIG_DFL)  # a third Ctrl-C ends the process even within a library's code
        raise Interrupted(number)
    if not state.deferring and len(state.received) == 1:  # a second one would interrupt the handling of the first
        raise Interrupted(number)
    if number == signal.SIGINT and state.deferring and first_process():
        os.write(2, WAITING.encode())  # print is not allowed here: it may be what the signal has interrupted


@contextmanager
def deferred() -> Iterator[None]:
    """Delay a signal to the end of the block, where Interrupted is raised; within it, ``first_signal`` returns it."""
    state = _signals
    state.deferring += 1
    try:
        yield
    finally:
        state.deferring -= 1
    if state.received:
        raise Interrupted(state.received[0])


def note_progress() -> None:
    """Record that something was saved that the next start of the command continues from, or does not repeat.

    That is a resume point, a finished run, or an answer of an evaluation.
    """
    _signals.progress_saved = True


def first_signal() -> int | None:
    """Return the number of the first signal that arrived; None: there was none."""
    return _signals.received[0] if _signals.received else None


@contextmanager
def sigterm_ignored() -> Iterator[None]:
    """Ignore SIGTERM within the block. SLURM sends it to a job that it requeues, which must still print its message."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def own_job() -> str | None:
    """Return the id of the SLURM job that this process is part of; None: there is none.

    A job of an array is <array>_<task>: its job id may be that of the array, and would requeue all its jobs. A job that
    was submitted by a job of an array has inherited the variables of that array, so SLURM is asked whether it is in it.
    """
    job, array, task = (os.environ.get(f"SLURM_{name}_ID") for name in ("JOB", "ARRAY_JOB", "ARRAY_TASK"))
    if not job or not array or not task:
        return job or None
    try:
        told = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return f"{array}_{task}"
    foreign = told.returncode == 0 and f"JobId={job} ArrayJobId={array} ArrayTaskId={task} " not in told.stdout
    return job if foreign else f"{array}_{task}"


def requeue(stop: Interrupted) -> str | None:
    """After SIGUSR1 or SIGUSR2 in a SLURM job, ask SLURM to queue the job again; return the result in words.

    A job that has been restarted often and again saved no progress is not: it would never end.
    None outside SLURM and after SIGTERM, which SLURM sends when it cancels or preempts a job.
    """
    first = os.environ.get("SLURM_PROCID", "0") == os.environ.get("RANK", "0") == "0"
    if stop.number not in WARNINGS or not first or shutil.which("scontrol") is None:
        return None
    job = own_job()
    if job is None:
        return None
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if restarts >= RESTARTS_WITHOUT_PROGRESS and not _signals.progress_saved:
        return (
            f"SLURM job {job} is not queued again: its start number {restarts + 1} saved nothing to continue from "
            "(resume points, finished runs, answers of evaluations); raise its time limit"
        )
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"SLURM job {job} could not be queued again ({error})"
    if done.returncode:
        return f"SLURM job {job} was not queued again ({' '.join(done.stderr.split())})"
    return f"SLURM job {job} is queued again"
