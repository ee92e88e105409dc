"""Several processes of one command on this machine, as srun starts them: without torchrun, each with its own output.

As a program: ``python forked.py`` imports the libraries once. For each line of its input, a ``Request`` as JSON, it
forks the processes, prints their process ids as JSON, and waits for their end.
"""

import errno
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Fault:
    """What goes wrong in one process: at the given call (1 is the first) of a function, it is killed or has no disk.

    place: ``<module>:<function or Class.method>``.  kind: "killed", or "full": the call raises OSError(ENOSPC).
    """

    place: str
    rank: int
    call: int = 1
    kind: str = "killed"


@dataclass(frozen=True)
class Request:
    """The processes of one command. folder: of their outputs.  program: relative to the project."""

    count: int
    folder: str
    arguments: Sequence[str]
    program: str
    fault: Fault | None


@dataclass(frozen=True)
class Forked:
    """Processes that were started together. folder: of their outputs, <rank>.txt."""

    pids: list[int]
    folder: Path

    def send(self, rank: int, number: int) -> None:
        """Send a signal to one process."""
        os.kill(self.pids[rank], number)

    def wait(self, seconds: float, but: Collection[int] = ()) -> dict[int, int]:
        """Return the exit codes by rank, of those that end in time; then kill the others. but: not waited for."""
        until, ranks = time.monotonic() + seconds, set(range(len(self.pids))) - set(but)
        while time.monotonic() < until and not ranks <= self.codes().keys():
            time.sleep(0.1)
        codes = self.codes()
        for rank in set(range(len(self.pids))) - set(codes):
            self.send(rank, signal.SIGKILL)
        while self.running:
            time.sleep(0.1)
        return codes

    @property
    def running(self) -> bool:
        """Return whether one of the processes has not ended."""
        return len(self.codes()) < len(self.pids)

    def codes(self) -> dict[int, int]:
        """Return the exit codes of the processes that have ended; -9 after SIGKILL."""
        files = {rank: self.folder / f"{rank}.code" for rank in range(len(self.pids))}
        return {rank: int(text) for rank, file in files.items() if file.exists() and (text := file.read_text())}

    @property
    def errors(self) -> list[str]:
        """Return the lines of all outputs that begin with "error: "."""
        lines = [line for rank in range(len(self.pids)) for line in self.output(rank).splitlines()]
        return [line for line in lines if line.startswith("error: ")]

    def output(self, rank: int) -> str:
        """Return what a process has printed."""
        return (self.folder / f"{rank}.txt").read_text()


class Forking(AbstractContextManager["Forking"]):
    """Starts processes that need not import the libraries: they are forked from one that has."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.parent = subprocess.Popen([sys.executable, __file__], cwd=ROOT, env=environment, **pipes)

    def __call__(
        self, count: int, folder: Path, *arguments: str, program: str = "run_exp.py", fault: Fault | None = None
    ) -> Forked:
        """Start the processes of a command, after all earlier ones have ended; return when all have begun."""
        folder.mkdir(parents=True, exist_ok=True)
        request = Request(count, str(folder), arguments, program, fault)
        print(json.dumps(asdict(request)), file=self.parent.stdin, flush=True)
        return Forked(json.loads(self.parent.stdout.readline()), folder)

    def __exit__(self, *_: object) -> None:
        self.parent.communicate()  # closes its input, at the end of which it ends


def fork(request: Request) -> None:
    """Fork the processes, and write the exit code of each one when it has ended."""
    folder = Path(request.folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids: list[int] = []
    for rank in range(request.count):
        pids.append(os.fork())
        if pids[-1] == 0:
            become(rank, request, port)
    print(json.dumps(pids), flush=True)
    for _ in pids:
        pid, status = os.wait()
        (folder / f"{pids.index(pid)}.code").write_text(str(os.waitstatus_to_exitcode(status)))


def become(rank: int, request: Request, port: int) -> None:
    """Run the program in this process, as one of several, and end."""
    joined = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": request.count, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in (joined | {"MASTER_PORT": port}).items()})
    output = os.open(Path(request.folder) / f"{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream, file in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
        os.dup2(file, stream)
    if request.fault is not None and request.fault.rank == rank:
        fails_at(request.fault)
    sys.argv = [request.program, *request.arguments]
    runpy.run_path(str(ROOT / request.program), run_name="__main__")
    sys.exit()


def fails_at(fault: Fault) -> None:
    """Change a function of this process so that the given call of it fails."""
    module, name = fault.place.split(":")
    owner: Any = sys.modules[module]
    *classes, name = name.split(".")
    for part in classes:
        owner = getattr(owner, part)
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def failing(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == fault.call and fault.kind == "killed":
            print(f"killed at {fault.place}, call {fault.call}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if calls == fault.call and fault.kind == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*arguments, **options)

    holders = [owner] if classes else [each for key, each in sys.modules.items() if key.startswith("lora_one")]
    for holder in holders:  # a function may have been imported by name
        if getattr(holder, name, None) is original:
            setattr(holder, name, failing)


def main() -> None:
    """Serve the requests until the input ends."""
    from lora_one.evaluation import command, gsm8k  # noqa: F401 (imported once, before the forks)
    from lora_one.evaluation.engines import local  # noqa: F401
    from lora_one.runs import cli, experiment  # noqa: F401

    for line in sys.stdin:
        given = json.loads(line)
        fault = given.pop("fault")
        fork(Request(**given, fault=None if fault is None else Fault(**fault)))


if __name__ == "__main__":
    main()
