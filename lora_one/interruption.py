"""SIGTERM, SIGUSR1, SIGUSR2 (preemption, a time limit) end a run with a resume point; SLURM may queue it again."""

import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)  # what #SBATCH --signal is given to send; submitit gives it the latter
SIGNALS = (signal.SIGTERM, *WARNINGS)

_asked: list[int] = []  # signals that came since ``caught`` began
_deferring: list[bool] = []


class Interrupted(KeyboardInterrupt):
    """The process was asked to end."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def exit_code(self) -> int:
        """As shells give it: 128 + the signal's number."""
        return 128 + self.number


@contextmanager
def caught() -> Iterator[None]:
    """Within it, a signal raises Interrupted: at once, or where ``deferred`` ends. Handlers are put back after it."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    before = {number: signal.signal(number, _on_signal) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked.clear()


def _on_signal(number: int, frame: FrameType | None) -> None:
    _asked.append(number)
    if not _deferring and len(_asked) == 1:  # a second one would break off the record of the first
        raise Interrupted(number)


@contextmanager
def deferred() -> Iterator[None]:
    """Within it, a signal waits: ``asked`` tells of it, and leaving raises it."""
    _deferring.append(True)
    try:
        yield
    finally:
        _deferring.pop()
    if _asked:
        raise Interrupted(_asked[0])


def asked() -> int | None:
    """The first signal that came, if one did."""
    return _asked[0] if _asked else None


def requeue(stop: Interrupted) -> str | None:
    """On SIGUSR1 or SIGUSR2 in a SLURM job, put it back into the queue; whether it may is SLURM's to say.

    On SIGTERM it is left to SLURM, which sends that when it cancels or preempts. A job of an array goes by its place
    there: one of them has the array's own number, which would stand for all.
    Returns what came of it in words, None where it does not apply.
    """
    array, place = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    job = f"{array}_{place}" if array and place else os.environ.get("SLURM_JOB_ID")
    first = os.environ.get("SLURM_PROCID", "0") == os.environ.get("RANK", "0") == "0"
    if stop.number not in WARNINGS or not job or not first or shutil.which("scontrol") is None:
        return None
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"SLURM job {job} could not be queued again ({error})"
    if done.returncode:
        return f"SLURM job {job} was not queued again ({' '.join(done.stderr.split())})"
    return f"SLURM job {job} is queued again"
