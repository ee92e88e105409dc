"""Several processes of run_exp.py, as srun starts them: without torchrun, and each with its own output.

As a program: ``python -m tests.helpers.forked COUNT FOLDER argument ...`` imports the libraries once, forks COUNT
processes that run the command with these arguments, and prints their process ids as JSON.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.paths import ROOT


@dataclass
class Forked:
    """Processes that were started together. folder: of their outputs, <rank>.txt."""

    parent: subprocess.Popen
    pids: list[int]
    folder: Path

    def send(self, rank: int, number: int) -> None:
        os.kill(self.pids[rank], number)

    def wait(self, seconds: float, but: Collection[int] = ()) -> dict[int, int]:
        """Return the exit codes by rank, of those that end in time; then kill the others. but: not waited for."""
        until, ranks = time.monotonic() + seconds, set(range(len(self.pids))) - set(but)
        while self.parent.poll() is None and time.monotonic() < until and not ranks <= self.codes().keys():
            time.sleep(0.1)
        codes = self.codes()
        for rank in set(range(len(self.pids))) - set(codes):
            os.kill(self.pids[rank], signal.SIGKILL)
        self.parent.communicate()
        return codes

    def codes(self) -> dict[int, int]:
        return {
            rank: int(file.read_text())
            for rank in range(len(self.pids))
            if (file := self.folder / f"{rank}.code").exists()
        }

    @property
    def errors(self) -> list[str]:
        """Return the lines of all outputs that begin with "error: "."""
        lines = [line for rank in range(len(self.pids)) for line in self.output(rank).splitlines()]
        return [line for line in lines if line.startswith("error: ")]

    def output(self, rank: int) -> str:
        return (self.folder / f"{rank}.txt").read_text()


def forked(count: int, folder: Path, *arguments: str) -> Forked:
    """Start the processes; return when all have begun."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tests.helpers.forked", str(count), str(folder), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    return Forked(parent, json.loads(parent.stdout.readline()), folder)


def main(count: int, folder: Path, arguments: list[str]) -> None:
    from lora_one.runs import cli, experiment  # noqa: F401 (imported once, before the forks)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(count):
        pids.append(os.fork())
        if pids[-1] == 0:
            joined = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": count,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            os.environ.update({name: str(value) for name, value in joined.items()})
            output = os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.argv = ["run_exp.py", *arguments]
            sys.exit(cli.command())
    print(json.dumps(pids), flush=True)
    for _ in pids:
        pid, status = os.wait()
        (folder / f"{pids.index(pid)}.code").write_text(str(os.waitstatus_to_exitcode(status)))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
