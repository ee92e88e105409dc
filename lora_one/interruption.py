"""SIGTERM, SIGUSR1 and SIGUSR2 (preemption, a time limit) end a run with a resume point; SLURM may requeue it."""

import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)  # that #SBATCH --signal may send; submitit uses the latter
SIGNALS = (signal.SIGTERM, *WARNINGS)


@dataclass
class Signals:
    """Signals of this process. They reach a process, not a function, so there is one such object."""

    came: list[int] = field(default_factory=list)  # since ``caught`` began
    deferring: int = 0  # how many ``deferred`` blocks are open


_signals = Signals()


class Interrupted(KeyboardInterrupt):
    """The process was asked to end."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as in shells."""
        return 128 + self.number


@contextmanager
def caught() -> Iterator[None]:
    """Raise Interrupted when a signal comes within the block: at once, or at the end of a ``deferred`` block."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    before = {number: signal.signal(number, _on_signal) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _signals.came.clear()


def _on_signal(number: int, frame: FrameType | None) -> None:
    state = _signals
    state.came.append(number)
    if not state.deferring and len(state.came) == 1:  # a second one would break off the record of the first
        raise Interrupted(number)


@contextmanager
def deferred() -> Iterator[None]:
    """Let a signal wait until the end of the block, which raises it; within the block ``asked`` returns it."""
    state = _signals
    state.deferring += 1
    try:
        yield
    finally:
        state.deferring -= 1
    if state.came:
        raise Interrupted(state.came[0])


def asked() -> int | None:
    """Return the first signal that came; None: there was none."""
    return _signals.came[0] if _signals.came else None


def requeue(stop: Interrupted) -> str | None:
    """On SIGUSR1 or SIGUSR2 in a SLURM job, ask SLURM to queue the job again.

    On SIGTERM it is left to SLURM, which sends that when it cancels or preempts. A job of an array is named by array
    and place: one of the jobs has the array's own number, which would requeue all of them.
    Returns the result in words; None where it does not apply.
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
