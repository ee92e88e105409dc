"""Several processes of run_exp.py on this machine, as srun starts them: without torchrun, each with its own output.

As a program: ``python forked.py COUNT FOLDER KILL argument ...`` imports the libraries once, forks COUNT processes that
run the command with these arguments, and prints their process ids as JSON. KILL: "none", or
"<module>:<function>:<rank>:<call>", where the process with this rank kills itself when the function is called.
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
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Forked:
    """Processes that were started together. folder: of their outputs, <rank>.txt."""

    parent: subprocess.Popen
    pids: list[int]
    folder: Path

    def send(self, rank: int, number: int) -> None:
        """Send a signal to one process."""
        os.kill(self.pids[rank], number)

    def wait(self, seconds: float, but: Collection[int] = ()) -> dict[int, int]:
        """Return the exit codes by rank, of those that end in time; then kill the others. but: not waited for."""
        until, ranks = time.monotonic() + seconds, set(range(len(self.pids))) - set(but)
        while self.parent.poll() is None and time.monotonic() < until and not ranks <= self.codes().keys():
            time.sleep(0.1)
        codes = self.codes()
        for rank in set(range(len(self.pids))) - set(codes):
            self.send(rank, signal.SIGKILL)
        self.parent.communicate()
        return codes

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


def forked(count: int, folder: Path, *arguments: str, kill: str = "none") -> Forked:
    """Start the processes; return when all have begun."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, str(count), str(folder), kill, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    return Forked(parent, json.loads(parent.stdout.readline()), folder)


def main(count: int, folder: Path, kill: str, arguments: list[str]) -> None:
    """Fork the processes, and write the exit code of each one when it has ended."""
    from lora_one.runs import cli, experiment  # noqa: F401 (imported once, before the forks)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(count):
        pids.append(os.fork())
        if pids[-1] == 0:
            joined = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1"}
            os.environ.update({name: str(value) for name, value in (joined | {"MASTER_PORT": port}).items()})
            output = os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.argv = ["run_exp.py", *arguments]
            if kill != "none":
                place, victim, call = kill.rsplit(":", 2)
                if rank == int(victim):
                    kill_at(place, int(call))
            sys.exit(cli.command())
    print(json.dumps(pids), flush=True)
    for _ in pids:
        pid, status = os.wait()
        (folder / f"{pids.index(pid)}.code").write_text(str(os.waitstatus_to_exitcode(status)))


def kill_at(place: str, call: int) -> None:
    """Make this process kill itself when ``<module>:<function or Class.method>`` is called for the given time."""
    module, name = place.split(":")
    owner: Any = sys.modules[module]
    *classes, name = name.split(".")
    for part in classes:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), 0

    def killing(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            print(f"killed at {place}, call {call}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    holders = [owner] if classes else [each for key, each in sys.modules.items() if key.startswith("lora_one")]
    for holder in holders:  # a function may have been imported by name
        if getattr(holder, name, None) is original:
            setattr(holder, name, killing)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
