"""Programs that nobody has read, run apart from everything, and a verdict on each that they cannot forge.

    for index, result in run_programs(programs, Limits(), workers=4): ...

What a program gets: a fresh ``python -I -S``, an empty environment, an empty working folder in memory, the
interpreter's own files read-only, and nothing else: no network, no other process, no other file, no /proc and /dev.
What it may use is limited, and all of it ends with its verdict. launcher.py says how the verdict comes about,
isolation.py how the isolation does. Linux; as root or as any user who may make user namespaces.

The limit on memory is one for each process: a program can hold up to ``processes`` times as much until its time is up.
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
    "no isolation here, {reason}: score on a machine that allows user namespaces, or add --unsafe to run the programs "
    "with this user's rights, files and network"
)


@dataclass(frozen=True)
class Program:
    """One candidate: prompt + completion define ``entry_point``; test defines ``check(candidate)``, which asserts."""

    prompt: str
    completion: str
    test: str
    entry_point: str


@dataclass(frozen=True)
class Limits:
    """What a program may use. seconds: wall clock once its interpreter is up; processes: threads count too."""

    seconds: float = 3.0
    memory_bytes: int = 1 << 30
    processes: int = 8
    file_bytes: int = 1 << 24
    folder_bytes: int = 1 << 25
    open_files: int = 64


class Launcher:
    """A launcher's process; it runs one program at a time. Raises RunError: no isolation here, or it does not start."""

    def __init__(self, limits: Limits, *, unsafe: bool = False):
        command = [interpreter(), "-I", "-S", "-B", "-c", START, str(Path(__file__).parent)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        try:
            self.process = subprocess.Popen(command, **pipes, env={}, start_new_session=True)
        except OSError as error:
            raise RunError(f"programs cannot be run here, the interpreter does not start ({error})") from error
        try:
            answer = self.ask({**asdict(limits), "isolated": not unsafe})
            if "refused" in answer:
                raise RunError(NO_ISOLATION.format(reason=f"the kernel refuses it ({answer['refused']})"))
        except BaseException:
            self.close()
            raise

    def run(self, program: Program) -> str:
        """``passed``, ``timed out`` or ``failed: <why>``. Raises RunError: there is no verdict, not for its fault."""
        answer = self.ask(asdict(program))
        if "broken" in answer:
            raise RunError(
                f"a program could not be run, {answer['broken']} (out of memory or processes?): score again with "
                "fewer --workers"
            )
        return answer["result"]

    def ask(self, message: dict[str, object]) -> dict[str, str]:
        """One line to the launcher and the one it answers. Raises RunError: it is dead."""
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:
            line = b""
        if not line:
            raise RunError("the sandbox's launcher ended unexpectedly (killed, or out of memory): score again")
        return json.loads(line)

    def close(self) -> None:
        """End it and whatever it runs; it leaves nothing behind."""
        with suppress(OSError):  # it may have ended before
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def check_isolation(limits: Limits) -> None:
    """Run a program, before there is anything to score. Raises RunError: it cannot be isolated here."""
    trivial = Program("", "def one():\n    return 1\n", "def check(one):\n    assert one() == 1\n", "one")
    launcher = Launcher(replace(limits, seconds=60))
    try:
        answer = launcher.ask(asdict(trivial))
    finally:
        launcher.close()
    if answer != {"result": "passed"}:
        raise RunError(
            NO_ISOLATION.format(reason=f"a trivial program does not run in it ({', '.join(answer.values())})")
        )


def run_programs(
    programs: Sequence[Program], limits: Limits, *, workers: int | None = None, unsafe: bool = False
) -> Iterator[tuple[int, str]]:
    """Yield (index, result) as programs end; workers (cores by default) run at a time.

    unsafe: without namespaces, as this user, with its files and network. Raises RunError: no isolation here.
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
