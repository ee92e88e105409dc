"""Run untrusted programs in isolation and return a verdict on each, which the program cannot forge.

    for index, result in run_programs(programs, Limits(), workers=4): ...

A program gets a fresh ``python -I -S``, an empty environment, an empty working folder in memory, and read-only access
to the interpreter's files. It has no network, no access to other processes or files, no /proc and no /dev. Its
resources are limited, and all of its processes end with its verdict. launcher.py describes how the verdict is found,
isolation.py how the program is isolated. This works only on Linux, as root or as a user who may create user namespaces.

The memory limit is per process: a program can use up to ``processes`` times as much until its time is up.
"""

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from queue import SimpleQueue

from lora_one.errors import RunError
from lora_one.evaluation.sandbox.isolation import interpreter

START = "import sys; sys.path.insert(0, sys.argv[1]); import launcher; launcher.main()"
NO_ISOLATION = (
    "programs cannot be isolated on this machine, {reason}: score on a machine that allows user namespaces, or pass "
    "--unsafe to run the programs with your permissions, files and network"
)


@dataclass(frozen=True)
class Program:
    """One program: prompt + completion define ``entry_point``; test defines ``check(candidate)`` with assertions."""

    prompt: str
    completion: str
    test: str
    entry_point: str


@dataclass(frozen=True)
class Limits:
    """Resource limits of a program.

    seconds: wall-clock time after the interpreter has started.  processes: including threads.
    """

    seconds: float = 3.0
    memory_bytes: int = 1 << 30
    processes: int = 8
    file_bytes: int = 1 << 24
    folder_bytes: int = 1 << 25
    open_files: int = 64


class Launcher:
    """A launcher process, which runs one program at a time. Raises RunError: isolation or the interpreter fails."""

    def __init__(self, limits: Limits, *, unsafe: bool = False):
        command = [interpreter(), "-I", "-S", "-B", "-c", START, str(Path(__file__).parent)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        try:
            self.process = subprocess.Popen(command, **pipes, env={}, start_new_session=True)
        except OSError as error:
            raise RunError(
                f"programs cannot run on this machine, because {command[0]} does not start ({error}): install Python "
                "there, or use another machine"
            ) from error
        try:
            answer = self.ask({**asdict(limits), "isolated": not unsafe})
            if "refused" in answer:
                raise RunError(NO_ISOLATION.format(reason=f"because the kernel refuses it ({answer['refused']})"))
        except BaseException:
            self.close()
            raise

    def run(self, program: Program) -> str:
        """Return ``passed``, ``timed out`` or ``failed: <reason>``. Raises RunError: the program could not be run."""
        answer = self.ask(asdict(program))
        if "broken" in answer:
            raise RunError(
                f"a program could not be run, because {answer['broken']} (possibly out of memory or processes): score "
                "again with fewer --workers"
            )
        return answer["result"]

    def ask(self, message: dict[str, object]) -> dict[str, str]:
        """Send one line to the launcher and return its answer. Raises RunError: the launcher has ended."""
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:
            line = b""
        if not line:
            raise RunError(
                "the sandbox's launcher process ended unexpectedly (it was killed or out of memory): score again, with "
                "fewer --workers if memory is short"
            )
        return json.loads(line)

    def close(self) -> None:
        """End the launcher and its program, with all their processes and files."""
        with suppress(OSError):  # the launcher may have ended already
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_isolation(limits: Limits) -> None:
    """Run a trivial program to test the isolation. Raises RunError: programs cannot be isolated on this machine."""
    trivial = Program("", "def one():\n    return 1\n", "def check(one):\n    assert one() == 1\n", "one")
    launcher = Launcher(replace(limits, seconds=60))
    try:
        answer = launcher.ask(asdict(trivial))
    finally:
        launcher.close()
    if answer != {"result": "passed"}:
        raise RunError(NO_ISOLATION.format(reason=f"because a trivial program fails ({', '.join(answer.values())})"))


def run_programs(
    programs: Sequence[Program], limits: Limits, *, workers: int | None = None, unsafe: bool = False
) -> Iterator[tuple[int, str]]:
    """Yield (index, result) in the order in which programs end; ``workers`` run at a time (default: one per core).

    unsafe: run without namespaces, with this user's rights, files and network.
    Raises RunError: programs cannot be isolated on this machine.
    """
    idle: SimpleQueue[Launcher] = SimpleQueue()
    launchers: list[Launcher] = []

    def run(program: Program) -> str:
        launcher = idle.get()
        try:
            return launcher.run(program)
        finally:
            idle.put(launcher)

    count = max(1, min(workers or cores(), len(programs)))
    pool = ThreadPoolExecutor(count)
    try:
        for _ in range(count):
            launchers.append(Launcher(limits, unsafe=unsafe))
            idle.put(launchers[-1])
        waiting = {pool.submit(run, program): index for index, program in enumerate(programs)}
        for done in as_completed(waiting):
            yield waiting[done], done.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for launcher in launchers:
            launcher.close()
