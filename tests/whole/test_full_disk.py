"""A full disk stops all processes with one message; when there is room, the same command goes on to the same result."""

import os
import shutil
import subprocess

import pytest
import torch

from lora_one.files import read_lines
from scripts.campaign.forked import Fault

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the processes would each take a GPU; written for CPUs"),
]
RUN = [
    "wandb.mode=disabled",
    "dataset.train_size=24",
    "dataset.validation_size=4",
    "dataset.accuracy_examples=0",
    "model.real_batch_size=8",
    "model.per_device_batch_size=2",
    "model.eval_epochs=1",
    "model.epochs=1",
    "model.save_steps=1",
    "process_timeout_s=16",
]
SMALL_DISK = "1400k"  # room for the factors of the start, 0.25 MB, and one resume point, 0.75 MB, but not for two


def result(folder):
    (adapter,) = folder.rglob("adapter/adapter_model.safetensors")
    lines = read_lines(adapter.parents[1] / "metrics.jsonl")
    return adapter.read_bytes(), [{key: line.get(key) for key in ("step", "loss", "eval_loss")} for line in lines]


@pytest.fixture(scope="module")
def undisturbed(forking, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    processes = forking(4, folder / "out", *RUN, f"results_dir={folder / 'results'}")
    assert processes.wait(300) == dict.fromkeys(range(4), 0), processes.output(0)
    return result(folder)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own for the results."""
    place = tmp_path / "results"
    place.mkdir()
    if os.getuid() or not shutil.which("mount"):
        pytest.skip("only root can mount a small disk")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "tmpfs", place], capture_output=True)
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def stopped(processes, where):
    """All processes end, and one says why."""
    assert processes.wait(120) == dict.fromkeys(range(4), 1), processes.errors
    (message,) = processes.errors
    assert "cannot be written" in message and "free disk space" in message and where in message
    assert "Traceback" not in "".join(map(processes.output, range(4)))


def test_the_disk_of_the_results_is_full(forking, undisturbed, small_disk, tmp_path):
    command = [*RUN, f"results_dir={small_disk}"]
    stopped(forking(4, tmp_path / "out", *command), "checkpoint-2")
    subprocess.run(["mount", "-o", "remount,size=40m", small_disk], check=True)
    again = forking(4, tmp_path / "again", *command)
    assert again.wait(300) == dict.fromkeys(range(4), 0), again.errors
    assert result(small_disk) == undisturbed


def test_the_disk_of_another_process_is_full(forking, undisturbed, tmp_path):
    """Each process writes the state of its random numbers into a resume point."""
    command = [*RUN, f"results_dir={tmp_path / 'results'}"]
    fault = Fault("transformers.trainer:Trainer._save_rng_state", rank=2, call=2, kind="full")
    stopped(forking(4, tmp_path / "out", *command, fault=fault), "checkpoint-2 cannot be written (No space left")
    again = forking(4, tmp_path / "again", *command)
    assert again.wait(300) == dict.fromkeys(range(4), 0), again.errors
    assert result(tmp_path / "results") == undisturbed
