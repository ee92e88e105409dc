"""Whole runs on several processes: the folders, the start and the losses are those of one process."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, finish, small_run
from safetensors.torch import load_file

from lora_one.run_folder import RunFolder
from lora_one.tracking import read_metrics

SMALL = [
    "wandb.mode=disabled",
    "dataset.train_size=41",  # a last batch of one example: one of two processes has none
    "dataset.validation_size=8",
    "dataset.accuracy_examples=4",
    "dataset.max_new_tokens=8",
    "model.real_batch_size=8",
    "model.per_device_batch_size=4",
]


def launcher(name):
    if name == "torchrun":
        return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    config = str(ROOT / "accelerate_config.yaml")
    return ["-m", "accelerate.commands.launch", "--main_process_port", port, "--config_file", config]


def launch(name, *arguments):
    command = [sys.executable, *launcher(name), str(ROOT / "run_exp.py"), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the two processes would each take a GPU; written for CPUs")
@pytest.mark.parametrize("name", ["torchrun", "accelerate"])
def test_two_processes_give_what_one_gives(tmp_path, name):
    """A sweep of two jobs, by torchrun and by the published line with the file for two GPUs."""
    done = launch(name, "-m", *SMALL, "seed=1,2", f"results_dir={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run: ") == 2, "the first process speaks"
    for seed in (1, 2):
        alone = finish(small_run(tmp_path / "one", "bundled/tiny", *SMALL[1:], f"seed={seed}"))
        together = RunFolder(tmp_path / "two" / alone.path.relative_to(tmp_path / "one"))
        assert list(together.path.glob("checkpoints/*/rng_state_1.pth")), "a second process took part"
        one, two = alone.read(), together.read()
        assert two["status"] == "finished" and two["config_hash"] == one["config_hash"]
        assert two["train"]["tokens"] == one["train"]["tokens"]
        assert two["init"]["loss_after"] == pytest.approx(one["init"]["loss_after"], rel=1e-6)
        assert two["init"]["relative_shift"] == pytest.approx(one["init"]["relative_shift"], rel=1e-5)
        lines = [read_metrics(folder.metrics) for folder in (alone, together)]
        for key in ("loss", "eval_loss", "eval_accuracy"):
            expected, found = ([line[key] for line in part if key in line] for part in lines)
            assert found == pytest.approx(expected, rel=1e-4) and found
        expected, found = (load_file(folder.adapter / "adapter_model.safetensors") for folder in (alone, together))
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-4)
    one, two = (
        sorted(path.parent.relative_to(tmp_path / part) for path in (tmp_path / part).rglob("run.json"))
        for part in ("one", "two")
    )
    assert two == one and len(one) == 2


def test_a_batch_that_two_processes_cannot_share_is_refused(tmp_path):
    done = launch("torchrun", *SMALL, "model.per_device_batch_size=8", f"results_dir={tmp_path}")
    assert done.returncode != 0
    assert "model.real_batch_size=8 is not divisible by model.per_device_batch_size=8 x 2 processes" in done.stderr
    assert not list(tmp_path.rglob("run.json"))
