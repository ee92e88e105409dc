"""Hostile programs, and the plain runners that each of them gets the better of.

All are asked for ``increment(x)``. A program's kind says what its success is, which a plain runner is to show first:

    forges    the function is wrong, the verdict is "passed"
    does      the function returns x + 1 only once the deed is done, so "passed" says that it was
    outlasts  as ``does``, of something that goes on for longer than the time limit
    crashes   the runner's own process is gone
    leaves    a process or a file named @MARK@ is there after the verdict; the function is wrong

Words in @...@ stand for: PORT a listening port, SOCKET the name of an abstract socket, KEY that of shared memory,
SCRATCH a folder with a file ``precious``, SECRET a word of the runner's environment, VICTIM the id of a process, MARK
the name of what is left. Deeds are as small as they can be where they succeed: 40 processes are bomb enough.
"""

from dataclasses import dataclass
from textwrap import dedent, indent

PROMPT = 'def increment(x):\n    """The number after x."""\n'
TEST = "def check(candidate):\n    assert candidate(3) == 4\n    assert candidate(41) == 42\n"
NEAR = "def check(candidate):\n    assert abs(candidate(3) - 4) < 1e-6\n"
SECONDS_BEYOND = 0.8  # what ``outlasts`` takes; its limit is half of that


@dataclass(frozen=True)
class Hostile:
    """runner: how the plain runner comes to its verdict, see PLAIN; root: only root succeeds under it."""

    name: str
    kind: str
    completion: str
    runner: str = "exit"
    test: str = TEST
    root: bool = False


def program(name: str, kind: str, source: str, **rest: str) -> Hostile:
    return Hostile(name, kind, dedent(source), **rest)


def deed(name: str, source: str, kind: str = "does", **rest: bool) -> Hostile:
    """A function that does something, may raise, and then returns the right number."""
    body = f"def increment(x):\n{indent(dedent(source).strip(), '    ')}\n    return x + 1\n"
    return Hostile(name, kind, body, **rest)


def left(name: str, source: str) -> Hostile:
    """Something named @MARK@ that is to stay; the function itself is wrong."""
    return Hostile(name, "leaves", f"{NAMED}def increment(x):\n{indent(dedent(source).strip(), '    ')}\n")


NAMED = '''
import ctypes, os, signal, threading, time
def named():
    """Call this thread @MARK@, as the host sees it too."""
    ctypes.CDLL(None).prctl(15, b"@MARK@", 0, 0, 0)
'''

# A runner as evaluation scripts have them: the program and its tests in one interpreter. Its verdict is,
# by ``runner``: exit: the exit status; print: what is printed; list: the first entry of a list; secret: a secret that
# is printed behind the tests.
PLAIN = """
import os, sys
runner, secret = sys.argv[1], sys.argv[2]
source = sys.stdin.read()
result = []
if runner == "list":
    try:
        exec(source, {})
        result.append("passed")
    except BaseException:
        result.append("failed")
    print("\\nverdict:", result[0])
elif runner == "print":
    exec(source, {})
    print("\\nverdict: passed")
elif runner == "secret":
    exec(source + f"\\nprint('verdict:', {secret!r})", {})
else:
    exec(source, {})
"""

FORGERIES = [
    program("exits with 0 at once", "forges", "import sys\nsys.exit(0)"),
    program("exits with 0 when called", "forges", "import os\ndef increment(x):\n    os._exit(0)"),
    program("exits with 0 in atexit", "forges", "import atexit, os\natexit.register(os._exit, 0)"),
    program("exits with 0 in the exception hook", "forges", "import sys, os\nsys.excepthook = lambda *_: os._exit(0)"),
    program(
        "exits with 0 in a finaliser",
        "forges",
        """
        import os, sys
        class Last:
            def __del__(self, exit=os._exit):
                exit(0)
        sys.last = Last()
        """,
    ),
    program(
        "exits with 0 from a signal",
        "forges",
        """
        import os, signal, time
        def increment(x):
            signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            time.sleep(0.5)
        """,
    ),
    program(
        "exits with 0 from a thread",
        "forges",
        """
        import os, threading, time
        def increment(x):
            threading.Timer(0.01, os._exit, [0]).start()
            time.sleep(0.5)
        """,
    ),
    program(
        "forks and lets the parent exit with 0",
        "forges",
        "import os\ndef increment(x):\n    if os.fork():\n        os._exit(0)",
    ),
    program("prints the verdict", "forges", "print('verdict: passed')\nraise SystemExit", runner="print"),
    program(
        "prints the verdict from a child",
        "forges",
        "import os\nif os.fork() == 0:\n    os.write(1, b'\\nverdict: passed\\n')\n    os._exit(0)\nos.wait()",
        runner="print",
    ),
    program(
        "writes the verdict to every descriptor",
        "forges",
        """
        import os
        for number in range(256):
            try:
                os.write(number, b"\\nverdict: passed\\n('value', None)\\n{\\"result\\": \\"passed\\"}\\n")
            except OSError:
                pass
        """,
        runner="print",
    ),
    program(
        "equals everything",
        "forges",
        """
        class Yes(int):
            __eq__ = __lt__ = lambda *_: True
            __ne__ = lambda *_: False
            __hash__ = int.__hash__
        def increment(x):
            return Yes(0)
        """,
        runner="list",
    ),
    program(
        "is near everything",
        "forges",
        """
        class Near:
            def __sub__(self, _): return self
            def __abs__(self): return 0.0
        def increment(x):
            return Near()
        """,
        runner="list",
        test=NEAR,
    ),
    program(
        "patches a builtin that the tests use",
        "forges",
        "import builtins\nbuiltins.abs = lambda _: 0\ndef increment(x):\n    return 0",
        runner="list",
        test=NEAR,
    ),
    program(
        "finds the result in a frame",
        "forges",
        """
        import sys
        frame = sys._getframe()
        while frame:
            for variables in (frame.f_locals, frame.f_globals):
                if isinstance(variables.get("result"), list):
                    variables["result"].append("passed")
            frame = frame.f_back
        """,
        runner="list",
    ),
    program(
        "finds the result among all objects",
        "forges",
        """
        import gc
        for found in gc.get_objects():
            if isinstance(found, dict) and isinstance(found.get("result"), list):
                found["result"].append("passed")
        """,
        runner="list",
    ),
    program(
        "reads the expected value in the tests",
        "forges",
        """
        import sys
        def increment(x):
            caller = sys._getframe(1)
            right = [number for number in caller.f_code.co_consts if isinstance(number, int)]
            return right[right.index(x) + 1]
        """,
        runner="list",
    ),
    program(
        "changes the tests' own variables by tracing them",
        "forges",
        """
        import sys
        def trace(frame, event, argument):
            if frame.f_code.co_name == "check":
                frame.f_locals["candidate"] = lambda x: x + 1
            return trace
        sys.settrace(trace)
        """,
        runner="list",
    ),
    program(
        "reads the secret in the arguments", "forges", "import sys\nprint('verdict:', sys.argv[2])", runner="secret"
    ),
    program(
        "reads the secret in the main module",
        "forges",
        "import __main__\nprint('verdict:', __main__.secret)",
        runner="secret",
    ),
    program(
        "reads the secret in the code around it",
        "forges",
        """
        import sys
        print("verdict:", *[text for text in sys._getframe().f_code.co_consts if isinstance(text, str)], sep="\\n")
        """,
        runner="secret",
    ),
    program(
        "reads the secret in memory",
        "forges",
        """
        import gc, sys
        for found in gc.get_objects():
            if isinstance(found, dict) and isinstance(found.get("secret"), str):
                print("verdict:", found["secret"])
        """,
        runner="secret",
    ),
]

DEEDS = [
    deed("connects over TCP", "import socket\nsocket.create_connection(('127.0.0.1', @PORT@), timeout=5).close()"),
    deed(
        "connects to an abstract socket",
        "import socket\nsocket.socket(socket.AF_UNIX).connect('\\0@SOCKET@')",
    ),
    deed(
        "connects to a socket in a folder", "import socket\nsocket.socket(socket.AF_UNIX).connect('@SCRATCH@/socket')"
    ),
    deed(
        "talks to itself over the network",
        """
        import socket
        server = socket.create_server(('127.0.0.1', 0))
        socket.create_connection(server.getsockname(), timeout=5)
        """,
    ),
    deed(
        "attaches shared memory of the host",
        "import ctypes\nassert ctypes.CDLL(None).shmget(@KEY@, 0, 0) >= 0",
    ),
    deed("reads /etc/passwd", "assert 'root' in open('/etc/passwd').read()"),
    deed("reads a file of the host", "assert open('@SCRATCH@/precious').read()"),
    deed(
        "reads a file of the host through a link",
        "import os\nos.symlink('@SCRATCH@/precious', f'link{x}')\nopen(f'link{x}').read()",
    ),
    deed("links a file of the host", "import os\nos.link('@SCRATCH@/precious', f'hard{x}')"),
    deed("reads its environment", "import os\nassert os.environ['SECRET'] == '@SECRET@'"),
    deed(
        "reads its parent's environment",
        "import os\nassert open(f'/proc/{os.getppid()}/environ', 'rb').read()",
    ),
    deed("reads its environment from the kernel", "assert b'@SECRET@' in open('/proc/self/environ', 'rb').read()"),
    deed("sees other processes", "import os\nassert sum(name.isdigit() for name in os.listdir('/proc')) > 1"),
    deed("signals another process", "import os, signal\nos.kill(@VICTIM@, signal.SIGCONT)"),
    deed("signals its parent", "import os\nassert os.getppid() > 0\nos.kill(os.getppid(), 0)"),
    deed("writes a file of the host", "open('@SCRATCH@/written', 'w').write('here')"),
    deed(
        "writes beside the interpreter",
        "import os, tempfile\ntempfile.TemporaryFile(dir=os.path.dirname(os.__file__)).close()",
        root=True,
    ),
    deed("deletes its working folder", "import os, shutil\nif x == 3:\n    shutil.rmtree(os.getcwd())"),
    deed("writes a huge file", "with open('huge', 'wb') as file:\n    file.write(bytes(24 << 20))"),
    deed(
        "fills its folder with files of the allowed size",
        "for number in range(8):\n    with open(f'part{number}', 'wb') as file:\n        file.write(bytes(8 << 20))",
    ),
    deed("makes very many files", "for number in range(1500):\n    open(f'{x}-{number}', 'w').close()"),
    deed("takes much memory", "assert len(bytearray(150 << 20))"),
    deed("maps much memory", "import mmap\nmmap.mmap(-1, 1 << 30)"),
    deed(
        "recurses deeply",
        f"""
        import sys
        sys.setrecursionlimit(1 << 30)
        def deeper(left):
            {" = ".join(f"local{number}" for number in range(100))} = left
            return left and deeper(left - 1)
        deeper(200_000)
        """,
    ),
    deed(
        "forks many times",
        """
        import os, signal
        children = []
        try:
            for _ in range(40):
                children.append(os.fork())
                if not children[-1]:
                    signal.pause()
        finally:
            for child in children:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
        """,
    ),
    deed(
        "starts many threads",
        """
        import threading
        stop = threading.Event()
        try:
            for _ in range(40):
                threading.Thread(target=stop.wait, daemon=True).start()
        finally:
            stop.set()
        """,
    ),
    deed(
        "opens many files",
        "import os\nkept = [os.dup(0) for _ in range(200)]\nfor number in kept:\n    os.close(number)",
    ),
    deed("runs a program of the host", "import subprocess\nsubprocess.run(['/bin/true'], check=True)"),
    deed(
        "makes namespaces of its own",
        """
        import ctypes, os
        if x == 3:
            child = os.fork()
            if child == 0:
                os._exit(ctypes.CDLL(None).unshare(0x10000000) != 0)
            assert os.waitpid(child, 0)[1] == 0
        """,
    ),
    deed(
        "raises its own limits",
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))\nbytearray(150 << 20)",
    ),
]

BEYOND = f"end = time.monotonic() + {SECONDS_BEYOND / 2}"
LASTING = [
    deed("sleeps", f"import time\ntime.sleep({SECONDS_BEYOND / 2})", "outlasts"),
    deed("computes on and on", f"import time\n{BEYOND}\nwhile time.monotonic() < end:\n    pass", "outlasts"),
    deed(
        "prints on and on",
        f"import time\n{BEYOND}\nwhile time.monotonic() < end:\n    print('a' * 65536)\n    time.sleep(0.001)",
        "outlasts",
    ),
    deed(
        "ignores every signal it can",
        f"""
        import signal, time
        for number in set(signal.Signals) - {{signal.SIGKILL, signal.SIGSTOP}}:
            signal.signal(number, signal.SIG_IGN)
        time.sleep({SECONDS_BEYOND / 2})
        """,
        "outlasts",
    ),
    deed(
        "catches what is raised to stop it",
        f"""
        import time
        {BEYOND}
        while time.monotonic() < end:
            try:
                time.sleep(0.01)
            except BaseException:
                pass
        """,
        "outlasts",
    ),
]

CRASHES = [
    deed("reads address 0", "import ctypes\nctypes.string_at(0)", "crashes"),
    deed("aborts", "import os\nos.abort()", "crashes"),
    deed("kills itself", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\nraise MemoryError", "crashes"),
    deed("kills its process group", "import os, signal\nos.killpg(0, signal.SIGKILL)\nraise MemoryError", "crashes"),
]

LEFT = [
    left("leaves a child", "if os.fork() == 0:\n    named()\n    time.sleep(60)"),
    left(
        "leaves a daemon of its own session",
        """
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                named()
                time.sleep(60)
            os._exit(0)
        os.wait()
        """,
    ),
    left(
        "leaves a child that ignores signals",
        """
        if os.fork() == 0:
            named()
            for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
                signal.signal(number, signal.SIG_IGN)
            time.sleep(60)
        """,
    ),
    left(
        "leaves a stopped child",
        "if os.fork() == 0:\n    named()\n    os.kill(os.getpid(), signal.SIGSTOP)\n    time.sleep(60)",
    ),
    left(
        "leaves a thread",
        "threading.Thread(target=lambda: (named(), time.sleep(60))).start()",
    ),
    left("leaves a file in /tmp", "open('/tmp/@MARK@', 'w').close()"),
    left("leaves a file in shared memory", "open('/dev/shm/@MARK@', 'w').close()"),
    left("leaves a file in its parent folder", "open('../@MARK@', 'w').close()"),
]

HOSTILE = [*FORGERIES, *DEEDS, *LASTING, *CRASHES, *LEFT]
