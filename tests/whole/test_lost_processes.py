"""One of several processes is killed or hangs: the others end with one message, and the same command goes on."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from lora_one.files import read_lines
from lora_one.records.folder import RunFolder
from tests.helpers.paths import ROOT
from tests.helpers.runs import SMALL

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the processes would each take a GPU; written for CPUs"),
]
TIME_OUT = 6
RUN = [*SMALL, "model.epochs=3", "model.save_steps=2"]
RUN = [*(change for change in RUN if "batch_size" not in change), "model.real_batch_size=6"]


def adapter_of(folder):
    (file,) = folder.rglob("adapter/adapter_model.safetensors")
    return file.read_bytes()


def losses_of(folder):
    (file,) = folder.rglob("metrics.jsonl")
    return [{key: line[key] for key in ("step", "loss", "eval_loss") if key in line} for line in read_lines(file)]


@pytest.fixture(scope="module")
def undisturbed(forking, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    processes = forking(3, folder / "out", *RUN, f"results_dir={folder / 'results'}")
    assert set(processes.wait(300).values()) == {0}, processes.output(0)
    return folder / "results"


@pytest.mark.parametrize(
    ("number", "victim"),
    [(signal.SIGSTOP, 1), (signal.SIGKILL, 0)],
    ids=["one hangs", "the first one is killed"],
)
def test_others_end_and_the_same_command_goes_on(number, victim, forking, undisturbed, tmp_path):
    command = [*RUN, f"process_timeout_s={TIME_OUT}", f"results_dir={tmp_path / 'results'}"]
    processes = forking(3, tmp_path / "out", *command)
    while not any('"loss"' in file.read_text() for file in tmp_path.rglob("metrics.jsonl")):
        assert processes.running, processes.output(0)
        time.sleep(0.05)
    processes.send(victim, number)
    began = time.monotonic()
    codes = processes.wait(60, but={victim})
    seconds = time.monotonic() - began
    others = {0, 1, 2} - {victim}
    assert set(codes) >= others and all(codes[rank] == 1 for rank in others), [processes.output(r) for r in range(3)]
    assert len(processes.errors) == 1, processes.errors
    name = f"process {victim} (pid {processes.pids[victim]}"
    assert name in processes.errors[0] or (victim == 0 and "process 0, which connects" in processes.errors[0])
    assert "Traceback" not in "".join(processes.output(rank) for rank in others)
    print(f"{seconds:.1f} s", os.linesep, processes.errors[0])
    again = forking(3, tmp_path / "again", *command)
    assert set(again.wait(300).values()) == {0}, again.output(0)
    assert adapter_of(tmp_path / "results") == adapter_of(undisturbed)
    assert losses_of(tmp_path / "results") == losses_of(undisturbed)
    (file,) = tmp_path.rglob("run.json")
    assert RunFolder(file.parent).read()["status"] == "finished"


@pytest.mark.long
def test_torchrun_starts_the_processes_again(undisturbed, tmp_path):
    """With --max-restarts, nobody has to give the command again."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3", "--max-restarts=1"]
    command = [sys.executable, *launcher, str(ROOT / "run_exp.py"), *RUN, f"results_dir={tmp_path}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as agent:
        while not any('"loss"' in file.read_text() for file in tmp_path.rglob("metrics.jsonl")):
            assert agent.poll() is None
            time.sleep(0.05)
        (victim,) = (child for child in psutil.Process(agent.pid).children() if child.environ().get("RANK") == "1")
        victim.kill()
        said = agent.communicate()[1]
    assert agent.returncode == 0, said
    assert adapter_of(tmp_path) == adapter_of(undisturbed)
    assert losses_of(tmp_path) == losses_of(undisturbed)
