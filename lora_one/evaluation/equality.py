"""Compare LaTeX answers for mathematical equality (math-verify), in processes with a time limit.

Answers are untrusted: ``9^{9^{9^9}}`` keeps the interpreter inside one multiplication, which neither a thread nor a
signal handler can stop. Therefore the kernel's alarm ends the process, and a new process compares the remaining pairs.
"""

import logging
import multiprocessing
import resource
import signal
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from lora_one.errors import RunError

MEMORY_BYTES = 4 << 30  # of each process


def equal(gold: str, answer: str) -> bool:
    """Return whether math-verify considers the answer equal to the gold answer; there is no time limit here."""
    return same(expressions(gold), expressions(answer))


def expressions(text: str) -> list[Any]:
    """Return math-verify's readings of an answer, the best one first; there is no time limit here."""
    from math_verify import parse

    return parse(f"${text}$", parsing_timeout=None)


def same(gold: list[Any], answer: list[Any]) -> bool:
    """Return whether math-verify considers the readings of two answers equal; there is no time limit here."""
    from math_verify import verify

    return verify(gold, answer, timeout_seconds=None)


Comparison = tuple[Callable[[str, str], bool], str, str]  # a function of a module, gold, answer


def compared(pairs: Sequence[Comparison], seconds: float, workers: int) -> Iterator[tuple[int, bool | None]]:
    """Yield (index, equal) for each comparison, in the order of completion; None: the time limit was exceeded.

    seconds: time limit for a comparison.  workers: number of processes.  Raises RunError: a process does not start.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "math_verify"])
    waiting = deque(range(len(pairs)))
    judges = [Judge(context, seconds) for _ in range(min(workers, len(pairs)))]
    try:
        while judges:
            for pipe in wait([judge.pipe for judge in judges]):
                place, judge = next((place, judge) for place, judge in enumerate(judges) if judge.pipe is pipe)
                try:
                    outcome = pipe.recv()
                except EOFError:
                    outcome = None
                    judge.end()
                    if judge.index is None:
                        raise RunError(
                            "a process that compares answers could not start: see its error above, or score again with "
                            "fewer --workers"
                        ) from None
                    judges[place] = Judge(context, seconds)
                if judge.index is not None:
                    yield judge.index, outcome
                if judges[place] is judge and waiting:
                    judge.index = waiting.popleft()
                    pipe.send(pairs[judge.index])
                elif not waiting:
                    judges.pop(place).end()
    finally:
        for judge in judges:
            judge.end()


class Judge:
    """A process that compares one pair at a time; ``index``: of its pair, None before the first pair."""

    def __init__(self, context: multiprocessing.context.BaseContext, seconds: float):
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, seconds), daemon=True)
        self.process.start()
        other.close()
        self.index: int | None = None

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def serve(pipe: Connection, seconds: float) -> None:
    """Send None when ready, then the result of each pair until the pipe closes; on timeout SIGALRM ends the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, resource.RLIM_INFINITY))
    logging.disable()
    warnings.simplefilter("ignore")
    pipe.send(None)
    while True:
        try:
            rule, gold, answer = pipe.recv()
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, seconds)
        outcome = rule(gold, answer)
        signal.setitimer(signal.ITIMER_REAL, 0)
        pipe.send(outcome)
