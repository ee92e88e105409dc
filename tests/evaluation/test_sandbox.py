"""Programs run apart: every hostile one gets the better of a plain runner, none of the sandbox."""

import ast
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter, OrderedDict
from decimal import Decimal
from fractions import Fraction
from glob import glob
from pathlib import Path

import psutil
import pytest

from lora_one.errors import RunError
from lora_one.evaluation import sandbox
from lora_one.evaluation.sandbox import Limits, Program, inside, isolation, run_programs
from tests.helpers.hostile_programs import HOSTILE, LASTING, PLAIN, PROMPT, SECONDS_BEYOND, TEST

HONEST = "    return x + 1\n"
PATIENT = Limits(seconds=30, memory_bytes=128 << 20)  # a busy machine must not decide a test
BRIEF = Limits(seconds=SECONDS_BEYOND / 2, memory_bytes=128 << 20)
SECRET = "xyzzy-2718"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """What hostile programs look for: a file, sockets that listen, another process; {word: what stands for it}."""
    scratch = Path(tempfile.mkdtemp(prefix="place-", dir="/tmp"))  # short: a socket's path has 107 bytes at most
    (scratch / "precious").write_text("precious")
    servers = [socket.create_server(("127.0.0.1", 0))]
    for address in (f"\0place-{os.getpid()}", str(scratch / "socket")):
        servers.append(socket.socket(socket.AF_UNIX))
        servers[-1].bind(address)
        servers[-1].listen()
    libc = ctypes.CDLL(None, use_errno=True)
    memory = libc.shmget(os.getpid(), 4096, 0o1666)
    assert memory >= 0, os.strerror(ctypes.get_errno())
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield {
        "@PORT@": str(servers[0].getsockname()[1]),
        "@SOCKET@": f"place-{os.getpid()}",
        "@KEY@": str(os.getpid()),
        "@SCRATCH@": str(scratch),
        "@SECRET@": SECRET,
        "@VICTIM@": str(victim.pid),
    }
    libc.shmctl(memory, 0, None)  # IPC_RMID
    victim.kill()
    victim.wait()
    for server in servers:
        server.close()
    subprocess.run(["rm", "-r", str(scratch)], check=True)


def mark_of(row):
    return f"hostile{HOSTILE.index(row)}-{os.getpid()}"[:15]


def completion_of(row, place):
    text = row.completion
    for word, value in {**place, "@MARK@": mark_of(row)}.items():
        text = text.replace(word, value)
    return text


def named(mark):
    """Processes with a living thread of that name."""
    found = set()
    for file in map(Path, glob("/proc/[0-9]*/task/[0-9]*/stat")):
        try:
            name, state = file.read_text().partition("(")[2].rpartition(")")[::2]
        except OSError:
            continue
        if name == mark and state.split()[0] != "Z":
            found.add(int(file.parts[2]))
    return found


def files_left(mark, place):
    return [path for folder in ("/tmp", "/dev/shm", place["@SCRATCH@"]) if (path := Path(folder, mark)).exists()]


def plainly(row, place, folder):
    """Whether the program has its success under its plain runner. What it leaves is cleared away."""
    work = Path(tempfile.mkdtemp(dir=place["@SCRATCH@"]))
    source = f"{PROMPT}{completion_of(row, place)}\n{row.test}\ncheck(increment)\n"
    mark = mark_of(row)
    with (folder / "said").open("w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", PLAIN, row.runner, SECRET],
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=subprocess.DEVNULL,
            cwd=work,
            env={"SECRET": SECRET},
            start_new_session=True,
        )
        process.stdin.write(source.encode())
        process.stdin.close()
        if row.kind == "leaves":
            for _ in range(300):
                if named(mark) or files_left(mark, place):
                    break
                time.sleep(0.05)
            succeeded = bool(named(mark) or files_left(mark, place))
            for pid in named(mark):
                os.kill(pid, signal.SIGKILL)
            for path in files_left(mark, place):
                path.unlink()
        process.wait(120)
        Path(place["@SCRATCH@"], "written").unlink(missing_ok=True)
        said.seek(0)
        words = said.read()
    if row.kind == "leaves":
        return succeeded
    if row.kind == "crashes":
        return process.returncode < 0
    return {"exit": process.returncode == 0, "secret": SECRET in words}.get(row.runner, "verdict: passed" in words)


@pytest.mark.parametrize("row", HOSTILE, ids=lambda row: row.name)
def test_every_attack_succeeds_without_the_sandbox(row, place, tmp_path):
    if row.root and os.geteuid() != 0:
        pytest.skip("only root can do that anywhere")
    assert plainly(row, place, tmp_path)


def machine():
    """What a program must not change: mounts, host name, limits, processes below this one."""
    below = {child.pid for child in psutil.Process().children(recursive=True)}
    limits = Path("/proc/self/limits").read_text()
    return Path("/proc/self/mountinfo").read_text(), socket.gethostname(), limits, below


@pytest.fixture(scope="module")
def verdicts(isolated, place):
    """{name: result} of all of them in the sandbox, and the machine before and after."""
    before = machine()
    found = {}
    for limits, rows in ((BRIEF, LASTING), (PATIENT, [row for row in HOSTILE if row not in LASTING])):
        programs = [Program(PROMPT, completion_of(row, place), row.test, "increment") for row in rows]
        found |= {rows[index].name: result for index, result in run_programs(programs, limits)}
    return found, before, machine()


@pytest.mark.parametrize("row", HOSTILE, ids=lambda row: row.name)
def test_no_attack_succeeds_in_the_sandbox(row, place, verdicts):
    result = verdicts[0][row.name]
    assert result.startswith("failed: ") if row.kind != "outlasts" else result == "timed out"
    assert named(mark_of(row)) == set() and files_left(mark_of(row), place) == []
    assert not Path(place["@SCRATCH@"], "written").exists()


def test_no_process_file_or_setting_remains_changed(verdicts):
    _, before, after = verdicts
    assert after == before


def test_a_crash_does_not_touch_the_next_program(isolated, place):
    rows = [row for row in HOSTILE if row.kind == "crashes"]
    programs = []
    for row in rows:
        programs.append(Program(PROMPT, completion_of(row, place), row.test, "increment"))
        programs.append(Program(PROMPT, HONEST, TEST, "increment"))
    results = dict(run_programs(programs, PATIENT, workers=1))
    assert all((results[index] == "passed") == bool(index % 2) for index in results)


def launcher(python=None, limits=PATIENT, isolated=True):
    """A launcher by itself, as its protocol has it."""
    folder = str(Path(sandbox.__file__).parent)
    command = [python or isolation.interpreter(), "-I", "-S", "-B", "-c", sandbox.START, folder]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={}, start_new_session=True)
    tell(process, {**vars(limits), "isolated": isolated})
    return process, json.loads(process.stdout.readline())


def tell(process, message):
    process.stdin.write(json.dumps(message).encode() + b"\n")
    process.stdin.flush()


def ended(process):
    process.stdin.close()
    process.stdout.close()
    return process.wait(60)


@pytest.mark.parametrize(("isolated_too", "killed"), [(True, False), (False, False), (True, True)])
def test_programs_are_killed_with_the_scorer_or_the_launcher(isolated_too, killed, isolated, place):
    """A killed scorer closes the pipe, and the launcher then kills its programs; a killed launcher does the same."""
    row = next(row for row in HOSTILE if row.kind == "leaves" and "session" in row.name)
    process, ready = launcher(isolated=isolated_too)
    assert ready == {"ready": True}
    tell(process, vars(Program(PROMPT, completion_of(row, place) + "    time.sleep(60)\n", TEST, "increment")))
    while not named(mark_of(row)):
        time.sleep(0.01)
    if killed:
        process.kill()
    assert ended(process) == (-signal.SIGKILL if killed else 0)
    for _ in range(500 if killed else 1):  # then the kernel does it, at its own pace
        if not named(mark_of(row)):
            break
        time.sleep(0.01)
    assert named(mark_of(row)) == set()


AS_A_USER = """
import os, sys
sys.path.insert(0, sys.argv[1])
import isolation
isolation.call("unshare", isolation.NEW_MOUNTS)
isolation.call("mount", None, "/", None, isolation.RECURSIVE | isolation.PRIVATE, None)
isolation.call("mount", sys.base_prefix, "/mnt", None, isolation.BIND, None)
os.chdir("/")
os.setgroups([])
os.setresgid(1234, 1234, 1234)
os.setresuid(1234, 1234, 1234)
python = f"/mnt/bin/{os.path.basename(isolation.interpreter())}"
os.execve(python, [python, *sys.argv[2:]], {})
"""


def test_an_ordinary_user_is_isolated_too(isolated, place, tmp_path):
    """Root tests this as another user, who reaches the interpreter through /mnt."""
    if os.geteuid() != 0:
        pytest.skip("every other test here runs as an ordinary user")
    wrapper = tmp_path / "python"
    folder = Path(sandbox.__file__).parent
    wrapper.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{AS_A_USER}' {folder} \"$@\"\n")
    wrapper.chmod(0o755)
    process, ready = launcher(python=str(wrapper))
    assert ready == {"ready": True}
    rows = [row for row in HOSTILE if row.kind in ("does", "crashes")]
    for completion, passes in [(HONEST, True), *((completion_of(row, place), False) for row in rows), (HONEST, True)]:
        tell(process, vars(Program(PROMPT, completion, TEST, "increment")))
        said = process.stdout.readline()
        assert said and (json.loads(said)["result"] == "passed") == passes, completion
    assert ended(process) == 0


class Text(str):
    pass


VALUES = [
    *(None, True, False, 0, -7, 1 << 61, -(1 << 62), 10**5000, 0.1, -0.0, float("inf"), 5e-324, 2 + 3j),
    *(
        "",
        "a'\"\\\n\u2028\ud800\U0001f600",
        b"\x00\xff",
        bytearray(b"ab"),
        range(2, 9, 3),
        Fraction(1, 3),
        Decimal("0.10"),
    ),
    *([], [1, [2.5, ("a", None)]], (), (1,), {1, 2}, frozenset({(1, 2)}), {"a": [1], (1, "b"): {2: {3}}}, {1: 2}),
    *(Counter("abca"), OrderedDict(a=1), Text("text")),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_plain_values_are_transferred_unchanged(value):
    line = ascii(inside.packed(value))
    assert "\n" not in line
    arrived = inside.unpacked(ast.literal_eval(line))
    assert arrived == value and value == arrived
    assert isinstance(value, type(arrived))


def test_other_objects_never_compare_equal():
    class Yes:
        def __eq__(self, _):
            return True

        def __bool__(self):
            return False

    arrived = inside.unpacked(ast.literal_eval(ascii(inside.packed(Yes()))))
    assert arrived != 4 and not arrived and repr(arrived) == "<Yes>"
    assert list(inside.unpacked(inside.packed(n * n for n in range(4)))) == [0, 1, 4, 9]
    nan = inside.unpacked(inside.packed(float("nan")))
    assert nan != nan


# Programs that take the channel over: the judge must live, and believe none of it.
BABBLE = {
    "no literal": b"passed\\n",
    "an expression": b"('value', __import__('os').getpid())\\n",
    "no pair": b"4\\n",
    "an unknown kind": b"('value', ('module', 'os'))\\n",
    "a wrong content": b"('value', ('list', 4))\\n",
    "an unhashable key": b"('value', ('dict', [(('list', []), 1)]))\\n",
    "deep nesting": b"(" * 100_000,
    "deep lists": b"('list',[" * 20_000 + b"\\n",
    "not text": b"\\xff\\xfe\\n",
    "half a line": b"('value', 4",
}


@pytest.mark.parametrize("babble", BABBLE)
def test_invalid_bytes_on_the_result_channel_fail(babble, isolated):
    source = f"import os\nos.write(3, {BABBLE[babble]!r}.decode('unicode_escape').encode('latin-1'))\nos._exit(0)\n"
    ((_, result),) = run_programs([Program("", source, TEST, "increment")], PATIENT)
    assert result.startswith("failed: the program")


def test_endless_result_is_an_error(isolated):
    source = "import os\nwhile True:\n    os.write(3, b'1' * 65536)\n"
    ((_, result),) = run_programs([Program("", source, TEST, "increment")], PATIENT)
    assert result == "failed: a result is too long"


def test_program_cannot_forge_a_verdict(isolated):
    """A program returns only values; the verdict is computed outside."""
    source = f"{PROMPT}    return x + 1\nimport sys\nsys.stdout.write('verdict: failed')\n"
    ((_, result),) = run_programs([Program("", source, TEST, "increment")], PATIENT)
    assert result == "passed"


@pytest.mark.parametrize(
    ("completion", "result"),
    [
        ("    return x", "failed: AssertionError"),
        ("    return x +", "failed: SyntaxError: invalid syntax (program.py, line 3)"),
        ("    return 1 / 0", "failed: ZeroDivisionError: division by zero"),
        ("    return (x,\n", "failed: SyntaxError: '(' was never closed (program.py, line 3)"),
        ("    pass\ndel increment", "failed: NameError: name 'increment' is not defined"),
        ("    raise Exception('a\\nb' * 999)", "failed: Exception: a ba ba"),
        ("    return x + 1\nif __name__ == '__main__':\n    raise SystemExit", "passed"),
        ("    raise Exception('\\ud800')", "failed: Exception: \\ud800"),
        ("    return input()", "failed: EOFError: EOF when reading a line"),
    ],
)
def test_results_name_the_reason_of_a_failure(completion, result, isolated):
    ((_, found),) = run_programs([Program(PROMPT, completion, TEST, "increment")], PATIENT)
    assert found.startswith(result) and len(found) < 520 and "\n" not in found


def test_program_sees_only_the_interpreter(isolated):
    """An empty environment and folder, one process, no /proc, /dev or home; no user of the host's."""
    source = """    import os
    seen = sorted({"proc", "dev", "home", "tmp"} & set(os.listdir("/")))
    return [sorted(os.environ), os.listdir("."), os.getpid(), os.getppid(), seen, os.getuid() == 0, os.listdir("/etc")]
"""
    expected = [[], [], 1, 0, [], False, ["ld.so.cache"]]
    test = f"def check(candidate):\n    assert candidate(0) == {expected}, candidate(0)\n"
    ((_, result),) = run_programs([Program(PROMPT, source, test, "increment")], PATIENT)
    assert result == "passed"


def test_missing_isolation_is_an_error(refusing_kernel):
    with pytest.raises(RunError, match=r"cannot be isolated.*unshare: Operation not permitted.*--unsafe"):
        list(run_programs([Program(PROMPT, HONEST, TEST, "increment")], PATIENT))


def test_unsafe_runs_without_namespaces_and_still_cleans_up(refusing_kernel, place):
    """Forged results fail here too, processes of other sessions are killed, and the working folders are deleted."""
    rows = [row for row in HOSTILE if row.kind in ("forges", "leaves", "crashes") and "file" not in row.name]
    programs = [Program(PROMPT, completion_of(row, place), row.test, "increment") for row in rows]
    where = "    import os\n    open('here', 'w').close()\n    raise ValueError(os.getcwd())\n"
    programs += [Program(PROMPT, completion, TEST, "increment") for completion in (where, HONEST)]
    before = machine()
    *results, folder, honest = (result for _, result in sorted(run_programs(programs, PATIENT, unsafe=True)))
    assert honest == "passed" and all(result.startswith("failed: ") for result in results)
    assert "/program-" in folder and not Path(folder.removeprefix("failed: ValueError: ")).exists()
    assert not any(named(mark_of(row)) for row in rows) and machine() == before


def test_a_launcher_that_dies_is_an_error(isolated):
    started = sandbox.Launcher(PATIENT)
    started.process.kill()
    with pytest.raises(RunError, match=r"launcher process ended unexpectedly.*fewer --workers"):
        started.run(Program(PROMPT, HONEST, TEST, "increment"))
    started.close()


def test_interrupted_scoring_leaves_no_process_or_file(isolated, place):
    """As with Ctrl-C: running programs are killed."""
    row = next(row for row in HOSTILE if row.kind == "leaves" and "session" in row.name)
    endless = Program(PROMPT, completion_of(row, place) + "    time.sleep(600)\n", TEST, "increment")
    running = run_programs([Program(PROMPT, HONEST, TEST, "increment"), *[endless] * 3], Limits(seconds=600), workers=2)
    assert next(running) == (0, "passed")
    running.close()
    assert named(mark_of(row)) == set()


def test_a_program_that_could_not_be_started_has_no_verdict(isolated, monkeypatch):
    """Not even a failure: it is an error of the machine."""
    broken = "import isolation; isolation.private_root = None; import launcher"
    monkeypatch.setattr(sandbox, "START", sandbox.START.replace("import launcher", broken))
    with pytest.raises(RunError, match=r"could not be run, because its process did not start.*fewer --workers"):
        list(run_programs([Program(PROMPT, HONEST, TEST, "increment")], PATIENT))
    with pytest.raises(RunError, match=r"cannot be isolated.*a trivial program .* did not start.*--unsafe"):
        sandbox.check_isolation(PATIENT)
