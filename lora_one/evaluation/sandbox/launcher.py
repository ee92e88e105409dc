"""A long-lived process (``python -I -S``, empty environment) that runs programs one by one; one JSON object per line.

For each program the launcher forks a judge, and the judge forks the program's process:

    launcher ── judge: the tests, and a proxy for the function ══ socket ══ program: a fresh python -I -S, isolated

The tests run in the judge, which asks the program's process for the result of each call and compares it. The program
has no access to the tests, the expected values or the verdict, so it can neither forge nor steal them. When the time
is up, the launcher kills the judge and all processes of the program; if the first process of a pid namespace ends, the
kernel ends all others in it.
"""

import ast
import json
import os
import random  # noqa: F401 (prompts and tests import it and typing, so both are loaded once for all judges)
import select
import shutil
import signal
import socket
import sys
import tempfile
import typing
from pathlib import Path

import inside
import isolation

LONGEST_REPLY = 1 << 24  # bytes of one packed result
NO_VERDICT = "failed: the judge ended without a verdict"
START_SECONDS = 60.0
UP = b"+"  # the judge sends it when the program's process has started, where the time limit begins
INSIDE = Path(inside.__file__).read_text()


def main() -> None:
    """Read the settings, then requests, from stdin; answer on stdout. The end of stdin also ends a running program."""
    requests, replies = os.dup(0), os.dup(1)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    lines = os.fdopen(requests, "rb")
    settings = json.loads(lines.readline())
    os.umask(0o022)
    try:
        isolation.call("prctl", isolation.SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        if settings["isolated"]:
            isolation.private_machine()
        answer(replies, {"ready": True})
    except OSError as error:
        answer(replies, {"refused": str(error)})
        return
    for line in lines:
        try:
            answer(replies, {"result": result_of(json.loads(line), settings, requests)})
        except NotStarted:
            answer(replies, {"broken": "its process did not start"})


def answer(replies: int, content: dict[str, typing.Any]) -> None:
    """Write one answer."""
    os.write(replies, json.dumps(content).encode() + b"\n")


class NotStarted(Exception):
    """The program's process could not be created, so there is no verdict on the program."""


def result_of(request: dict[str, str], settings: dict[str, typing.Any], requests: int) -> str:
    """Return ``passed``, ``timed out`` or ``failed: <reason>``, and remove all processes and files of the program.

    Raises NotStarted: memory, processes or namespaces are exhausted, which is not a failure of the program.
    """
    folder = None if settings["isolated"] else tempfile.mkdtemp(prefix="program-")
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ours)
        in_child(lambda: judge(request, settings, folder, theirs))
    os.close(theirs)
    try:
        if heard(ours, requests, START_SECONDS, len(UP)) != UP:
            raise NotStarted
        verdict = heard(ours, requests, settings["seconds"], 1 << 16)
    finally:
        os.close(ours)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kill_descendants()
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
    return "timed out" if verdict is None else verdict.decode() or NO_VERDICT


def heard(judge_says: int, requests: int, seconds: float, size: int) -> bytes | None:
    """Return what the judge sends within ``seconds``, b"" if it has ended; None: the time is up."""
    ready, _, _ = select.select([judge_says, requests], [], [], seconds)
    if ready == [requests]:  # the next request comes after this answer, so stdin is closed and the scorer has ended
        raise SystemExit
    return os.read(judge_says, size) if ready else None


def in_child(work: typing.Callable[[], None]) -> typing.NoReturn:
    """Run ``work`` in a forked process and end the process without the clean-up functions of the parent."""
    try:
        work()
    except BaseException as error:
        print(f"sandbox: {inside.described(error)}", file=sys.stderr)
    finally:
        os._exit(1)


def kill_descendants() -> None:
    """Kill and reap all descendants, which are reparented to this process, their subreaper."""
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                for pid in children():
                    os.kill(pid, signal.SIGKILL)
                os.waitpid(-1, 0)
        except ChildProcessError:
            return


def children() -> list[int]:
    """Return the process ids of this process's children."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # the process has ended in the meantime
            continue
        if int(fields[1]) == os.getpid():
            found.append(int(stat.parent.name))
    return found


def judge(request: dict[str, str], settings: dict[str, typing.Any], folder: str | None, verdict: int) -> None:
    """Start the program, report that it has started, run the tests on it, and write the verdict."""
    null = os.open("/dev/null", os.O_RDWR)
    here, there = socket.socketpair()
    isolated = settings["isolated"]
    if isolated:
        isolation.other_user()
    isolation.end_with_parent()
    program = os.fork()
    if program == 0:
        in_child(lambda: start_program(settings, folder, there.fileno(), null))
    there.close()
    os.dup2(null, 2)
    if isolated:
        os.chroot(isolation.BOX)  # in BOX, nobody can also read an interpreter that is in root's home folder
        os.chdir("/")
    isolation.set_limits(settings, processes=False)
    candidate = Candidate(here)
    if candidate.is_up():
        os.write(verdict, UP)
    result = tested(request, candidate)
    os.kill(program, signal.SIGKILL)
    os.waitpid(program, 0)
    os.write(verdict, result.encode(errors="backslashreplace"))


def start_program(settings: dict[str, typing.Any], folder: str | None, channel: int, null: int) -> None:
    """Replace this process by the program's: isolate it, set its limits, start its interpreter."""
    isolation.end_with_parent()
    os.setsid()  # signals to a process group cross pid namespaces
    if settings["isolated"]:
        isolation.private_root(settings["folder_bytes"])
    else:
        os.chdir(folder)
    os.dup2(null, 2)
    os.dup2(channel, inside.CHANNEL)
    os.set_inheritable(inside.CHANNEL, True)
    isolation.set_limits(settings, processes=settings["isolated"])
    python = isolation.interpreter()
    os.execve(python, [python, "-I", "-S", "-B", "-c", INSIDE], {})


class Raised(Exception):
    """The program raised an exception, described by the text."""


class Ended(Exception):
    """The program's process has ended, or its answer is not valid."""


class Candidate:
    """Proxy for the program's function in the tests; calls are computed in the program's process."""

    def __init__(self, channel: socket.socket):
        self.channel = channel
        self.replies = channel.makefile("rb")

    def is_up(self) -> bool:
        """Return whether the process has started inside.py, which it reports before it reads the program."""
        return self.replies.readline() == inside.UP

    def load(self, program: str, name: str) -> None:
        self._ask((program, name))

    def __call__(self, *arguments: typing.Any, **named: typing.Any) -> typing.Any:
        return self._ask((inside.packed(arguments), inside.packed(named)))

    def _ask(self, question: tuple[typing.Any, typing.Any]) -> typing.Any:
        try:
            self.channel.sendall(ascii(question).encode() + b"\n")
            line = self.replies.readline(LONGEST_REPLY)
        except OSError:
            line = b""
        if not line.endswith(b"\n"):
            long = len(line) == LONGEST_REPLY
            raise Ended("a result is too long" if long else "the program ended before its tests did")
        try:
            kind, content = ast.literal_eval(line.decode())
            value = inside.unpacked(content)
        except Exception as error:  # the answer is untrusted and may fail in any way
            raise Ended("the program's answer is not a valid value") from error
        if kind == "raised":
            raise Raised(str(value))
        return value


def tested(request: dict[str, str], candidate: Candidate) -> str:
    """Run the tests on the candidate and return the verdict.

    The tests may use names that the prompt defines, so the prompt is run here, with the candidate as its function.
    """
    namespace: dict[str, typing.Any] = {}
    try:
        candidate.load(request["prompt"] + request["completion"], request["entry_point"])
        exec(request["prompt"], namespace)
        namespace[request["entry_point"]] = candidate
        exec(request["test"], namespace)
        namespace["check"](candidate)
    except (Raised, Ended) as error:
        return f"failed: {error}"
    except BaseException as error:
        return f"failed: {inside.described(error)}"
    return "passed"
