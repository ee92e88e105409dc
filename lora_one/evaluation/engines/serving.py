"""Start vLLM for a model, wait until it is ready, and stop it.

vLLM requires other versions of torch and transformers than this project, so it is a program of another environment,
which scripts/serve.sh makes.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from lora_one.errors import RunError, UsageError
from lora_one.evaluation.options import EvaluationOptions
from lora_one.evaluation.source import base_name
from lora_one.interruption import caught, deferred
from lora_one.progress import duration, first_process

AS_FITS = -1  # for vLLM's --max-model-len: positions of the model, or as many as its memory can hold
SERVED_NAME = "model"  # of the model in the server's API
FULL_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
SETTINGS = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
CPU_SETTINGS = {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "2"}  # GiB
# of this process; vLLM would import our packages, or take itself for one of our processes
NOT_INHERITED = ("PYTHONPATH", "PYTHONHOME", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PREFIX = re.compile(r"^(\([^()]*\) )?((INFO|WARNING|ERROR) \d\d-\d\d [\d:]+ (\[[^\]]*\] )?)?")  # of a line of its log
KILLED = 5.0  # seconds until processes are gone after SIGKILL


@dataclass(frozen=True)
class Patience:
    """Times in seconds. start: until vLLM is ready.  end: from SIGTERM to SIGKILL.  report: between two lines."""

    start: float = 15 * 60.0
    end: float = 20.0
    report: float = 30.0
    poll: float = 0.2


def environment() -> Path:
    """Return the folder of the environment that scripts/serve.sh makes."""
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(data).expanduser() / "lora-one" / "vllm"


def find_vllm(given: str | None) -> Path:
    """Return the program ``vllm``: the given one, or the one on PATH, or that of scripts/serve.sh.

    given: the program, or the folder of an environment (--vllm).  Raises UsageError: there is no such program.
    """
    if given is not None:
        path = Path(given).expanduser()
        program = path / "bin" / "vllm" if path.is_dir() else path
        if not (program.is_file() and os.access(program, os.X_OK)):
            raise UsageError(
                f"--vllm={given}: {program} is not a program: pass an environment with vLLM, or its program bin/vllm; "
                "scripts/serve.sh makes such an environment"
            )
        return program
    on_path = shutil.which("vllm")
    if on_path is not None:
        return Path(on_path)
    made = environment()
    if (made / "installed").exists():
        return made / "bin" / "vllm"
    state = "was not installed completely" if made.exists() else "does not exist"
    raise UsageError(
        f"--serve needs vLLM: there is no program vllm on PATH, and its environment {made} {state}: make it with "
        "bash scripts/serve.sh, or pass --vllm=<environment>"
    )


def serve_command(vllm: Path, model: str, port: int, dtype: str, max_model_len: int | None, *, gpu: bool) -> list[str]:
    """Return the command that serves a model. dtype: fp32, bf16 or fp16; gpu: whether vLLM runs on a GPU.

    The checkpoint's generation_config.json, whose penalties change greedy texts too, is not read.
    """
    options = ["--served-model-name", SERVED_NAME, "--host", "127.0.0.1", "--port", str(port)]
    options += ["--dtype", FULL_NAMES[dtype], "--generation-config", "vllm"]
    options += [f"--max-model-len={AS_FITS if max_model_len is None else max_model_len}"]
    options += [] if gpu else ["--enforce-eager"]  # on a CPU, compiling takes longer than it saves
    return [str(vllm), "serve", model, *options]


@contextmanager
def served(
    model: Path | str,
    vllm: Path,
    log: Path,
    *,
    dtype: str = "auto",
    max_model_len: int | None = None,
    options: Sequence[str] = (),
    patience: Patience | None = None,
) -> Iterator[str]:
    """Serve a model with vLLM on a free port of this machine within the block; yield the server's base URL.

    However the block ends, vLLM and its child processes are stopped.

    model: a folder or a hub id.  vllm: as ``find_vllm`` returns it.  log: the file for vLLM's output.
    dtype: fp32, bf16, fp16, or "auto" for that of the checkpoint; vLLM's own "auto" would serve fp32 in 16 bits.
    max_model_len: positions of a prompt with its completion; None: those of the model, or as many as fit in memory.
    options: more options of ``vllm serve``.
    Raises RunError: vLLM cannot be started, ends early, or is not ready in time; the message has the end of its output.
    """
    from lora_one.models import local_folder

    patience, gpu, port = patience or Patience(), has_gpu(), free_port()
    number_type = stored_dtype(str(model)) if dtype == "auto" else dtype
    source = local_folder(str(model), key="--model_name") or model
    command = [*serve_command(vllm, str(source), port, number_type, max_model_len, gpu=gpu), *options]
    variables = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    variables = ({} if gpu else CPU_SETTINGS) | variables | SETTINGS
    log.parent.mkdir(parents=True, exist_ok=True)
    process = None
    with caught(), log.open("wb") as output:
        streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        try:
            with deferred():  # a signal between the start and this block would leave vLLM alone
                process = subprocess.Popen(command, env=variables, start_new_session=True, **streams)
            wait_until_ready(process, port, log, patience)
            yield f"http://127.0.0.1:{port}"
        except OSError as error:
            if process is not None:
                raise
            raise RunError(f"vLLM could not be started ({error}): check --vllm={vllm}") from error
        finally:
            if process is not None:
                stop(process, patience)


def has_gpu() -> bool:
    """Return whether this machine has an accelerator; vLLM uses it then."""
    import torch

    return torch.accelerator.is_available()


def stored_dtype(model: str) -> str:
    """Return the dtype of a checkpoint, as its configuration names it: fp32, bf16 or fp16; fp32 if it does not."""
    from lora_one.models import DTYPES, load_config

    stored = getattr(load_config(model), "dtype", None)
    return next((name for name, dtype in DTYPES.items() if dtype == stored), "fp32")


def free_port() -> int:
    """Return a port of 127.0.0.1 on which nothing listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path, patience: Patience) -> None:
    """Wait until the server answers, with a line now and then. Raises RunError: it ends before, or takes too long."""
    began = reported = time.monotonic()
    note(f"vLLM is starting; its output is in {log}")
    while not healthy(port):
        elapsed = time.monotonic() - began
        if process.poll() is not None:
            raise RunError(f"vLLM ended with exit code {process.returncode} before it was ready{end_of(log)}")
        if elapsed > patience.start:
            raise RunError(f"vLLM was not ready after {duration(elapsed)}, and was stopped{end_of(log)}")
        if time.monotonic() - reported > patience.report:
            reported = time.monotonic()
            note(f"vLLM is starting: {duration(elapsed)} elapsed")
        time.sleep(patience.poll)
    note(f"vLLM is ready after {duration(time.monotonic() - began)}")


def note(text: str) -> None:
    """Print a line on stderr, in the first of several processes."""
    if first_process():
        print(text, file=sys.stderr, flush=True)


def healthy(port: int) -> bool:
    """Return whether a server on this port of 127.0.0.1 says that it is ready."""
    connection = HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def end_of(log: Path, lines: int = 3) -> str:
    """Return what to read in the output: its last errors, or its last lines if it has none, and where all of it is."""
    text = log.read_text(errors="replace")
    found = [stripped for line in text.splitlines() if (stripped := PREFIX.sub("", line).strip())]
    errors = [line for line in found if re.match(r"\w*(Error|Exception)\b:? \S", line)]
    last = " | ".join(list(dict.fromkeys(errors or found))[-lines:])
    return f"{': ' if last else ''}{last[:1000]} (all of its output: {log})"


def stop(process: subprocess.Popen[bytes], patience: Patience) -> None:
    """End vLLM and its children: SIGTERM to vLLM, then SIGKILL to those of its session that are left."""
    try:
        if process.poll() is None:
            note(f"stopping vLLM, which takes up to {duration(patience.end)}")
            process.terminate()
        wait_until_gone(process, patience.end)
    finally:  # a second signal does not leave it alone either
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        wait_until_gone(process, KILLED)


def wait_until_gone(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Wait until the process and its children have ended, at most for this time."""
    limit = time.monotonic() + seconds
    while (process.poll() is None or left(process.pid)) and time.monotonic() < limit:
        time.sleep(0.05)


def left(group: int) -> bool:
    """Return whether a process group has running processes.

    In a container whose first process does not await orphans, ended ones stay in the group.
    """
    for process in psutil.process_iter(["status"]):
        with suppress(ProcessLookupError, PermissionError):
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                return True
    return False


def merged_for_serving(adapter: Path, base: str, folder: Path, dtype: str = "auto") -> Path:
    """Write the base merged with an adapter to a folder that vLLM can serve, and return the folder.

    adapter: its folder.  base: a folder or a hub id.  dtype: of the merged weights, as of a model that is evaluated
    with transformers; a quantised base is dequantised first.
    Raises UsageError: the folder has no adapter, or it does not fit the base.
    """
    from lora_one.adaptation.checkpoints import load_adapter
    from lora_one.adaptation.merging import dequantized, merge_adapter, save_merged
    from lora_one.models import load_model, load_tokenizer
    from lora_one.records.folder import base_of, revision_of

    revision = revision_of(adapter, base)
    model = load_model(base, revision, where="cpu", **{"dtype": dtype} | base_of(adapter, dtype))
    save_merged(merge_adapter(load_adapter(dequantized(model), adapter)), load_tokenizer(base, revision), folder)
    return folder


@contextmanager
def serving(options: EvaluationOptions, output: Path) -> Iterator[EvaluationOptions]:
    """Serve the evaluated model within the block; yield the options with the address of the server.

    An adapter is merged first, into a folder inside ``output`` that is removed at the end.
    """
    output.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="merged_", dir=output) as folder:
        model = options.model_name
        if options.adapter is not None:
            adapter = Path(options.adapter).expanduser()
            base = base_name(adapter) if model is None else model
            model = str(merged_for_serving(adapter, base, Path(folder), options.dtype))
        with served(model, find_vllm(options.vllm), output / "vllm.log", dtype=options.dtype) as url:
            yield replace(options, base_url=url, served_model=SERVED_NAME, model_name=model, adapter=None)
