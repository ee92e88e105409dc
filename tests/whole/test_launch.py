"""Whole runs on several processes: the folders, the start and the losses are those of one process."""

import math
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from safetensors.torch import load_file

from lora_one.errors import UsageError
from lora_one.files import read_lines
from lora_one.records.folder import RunFolder
from lora_one.runs import experiment
from tests.helpers.paths import ROOT, shared
from tests.helpers.runs import SMALL, finish, run_config, small_run

ANSWERS = "dataset.accuracy_examples=4"


def launcher(name):
    if name == "torchrun":
        return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    config = "accelerate_config.yaml"
    return ["-m", "accelerate.commands.launch", "--main_process_port", port, "--config_file", config]


def started(name, *arguments):
    command = [sys.executable, *launcher(name), str(ROOT / "run_exp.py"), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes, cwd=ROOT, env=environment)


def launch(name, *arguments):
    with started(name, *arguments) as process:
        out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the two processes would each take a GPU; written for CPUs")
@pytest.mark.parametrize("name", ["torchrun", "accelerate"])
def test_two_processes_give_the_results_of_one(tmp_path, name):
    """A sweep of two jobs, by torchrun and by the published line with the file for two GPUs."""
    done = launch(name, "-m", *SMALL, ANSWERS, "seed=1,2", f"results_dir={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run: ") == 2, "the first process speaks"
    for seed in (1, 2):
        alone = finish(small_run(tmp_path / "one", "bundled/tiny", *SMALL[1:], ANSWERS, f"seed={seed}"))
        together = RunFolder(tmp_path / "two" / alone.path.relative_to(tmp_path / "one"))
        assert list(together.path.glob("checkpoints/*/rng_state_1.pth")), "a second process took part"
        one, two = alone.read(), together.read()
        assert two["status"] == "finished" and two["config_hash"] == one["config_hash"]
        assert two["train"]["tokens"] == one["train"]["tokens"]
        assert two["init"]["loss_after"] == pytest.approx(one["init"]["loss_after"], rel=1e-6)
        assert two["init"]["relative_shift"] == pytest.approx(one["init"]["relative_shift"], rel=1e-5)
        lines = [read_lines(folder.metrics) for folder in (alone, together)]
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


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the two processes would each take a GPU; written for CPUs")
@pytest.mark.long
def test_optimizers_of_pairs_give_the_losses_of_one_process(tmp_path):
    """Every process computes the same steps from the averaged gradients."""
    names = ("lora_pro", "lora_muon", "lora_rite")
    small = [*SMALL, "model.learning_rate=1e-3", "peft=dora"]
    done = launch("torchrun", "-m", *small, f"optimizer={','.join(names)}", f"results_dir={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr
    for name in names:
        alone = finish(small_run(tmp_path / "one", "bundled/tiny", *small[1:], f"optimizer={name}"))
        together = RunFolder(tmp_path / "two" / alone.path.relative_to(tmp_path / "one"))
        assert list(together.path.glob("checkpoints/*/rng_state_1.pth")), "a second process took part"
        one, two = ([line["loss"] for line in read_lines(run.metrics) if "loss" in line] for run in (alone, together))
        assert two == pytest.approx(one, rel=1e-4) and one, name


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the two processes would each take a GPU; written for CPUs")
def test_the_published_command_for_two_gpus(tmp_path):
    """As written but for model, data (32 rows of a real set) and precision."""
    data = shared("data/commonsense/openbookqa/train.json.gz")
    published = "-m model.epochs=3 model.eval_epochs=3 ++model.saving=false model.real_batch_size=16 "
    published += "++dataset_name=commonsense_reasoning +init=gradient ++init.direction=LoRA-One ++init.max_length=256 "
    published += "++model.max_length=256 ++peft.lora_r=16 +peft=qv wandb.name=enter-name-here ++init.scale=stable "
    published += "peft.use_rslora=True peft.lora_alpha=16 ++peft.lora_dropout=0.05 ++init.stable_gamma=128 "
    published += "model.learning_rate=5e-5 ++seed=42"
    here = [f"model.name={shared('models/stories260K-hf')}", "model.bf16=false", f"dataset.path={data}"]
    here += ["dataset.max_train_samples=32", "dataset.max_eval_samples=4", "wandb.mode=disabled"]
    done = launch("accelerate", *published.split(), *here, f"results_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("lora-one_commonsense_reasoning/enter-name-here-*/42/run.json")
    record = RunFolder(file.parent).read()
    kept = record["data"]["train"]["whole"] + record["data"]["train"]["shortened"]
    assert record["status"] == "finished" and record["train"]["steps"] == 3 * math.ceil(kept / 16)
    assert len(list(file.parent.glob("checkpoints/*/rng_state_*.pth"))) == 2, "two processes took part"
    factors = load_file(file.parent / "adapter" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in factors} == {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"}
    assert all(min(factor.shape) == 16 for factor in factors.values())


@pytest.mark.slow
def test_a_batch_that_two_processes_cannot_share_is_refused(tmp_path):
    small = [change for change in SMALL if not change.startswith("model.real_batch_size")]
    done = launch(
        "torchrun", *small, "model.real_batch_size=7", "model.per_device_batch_size=7", f"results_dir={tmp_path}"
    )
    assert done.returncode != 0
    assert "model.real_batch_size=7 is not divisible by 2 processes: set it to a multiple of 2" in done.stderr
    assert not list(tmp_path.rglob("run.json"))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the two processes would each take a GPU; written for CPUs")
@pytest.mark.parametrize("interrupted", [pytest.param(False, marks=pytest.mark.long), True])
def test_sharded_base_gives_the_same_results(tmp_path, interrupted):
    """The start, every loss and the adapter; also where the run is told to end and goes on from its resume point."""
    changes = [*SMALL[1:], "model.gradient_checkpointing=true", "model.epochs=3"]
    changes += ["optimizer=scaled_adamw"] if interrupted else []
    command = ["wandb.mode=disabled", *changes, "model.sharded=true", f"results_dir={tmp_path / 'sharded'}"]
    if interrupted:
        with started("torchrun", *command) as process:
            while not any('"loss"' in file.read_text() for file in tmp_path.rglob("metrics.jsonl")):  # of training
                assert process.poll() is None
                time.sleep(0.1)
            process.send_signal(signal.SIGTERM)
            process.communicate()
        (file,) = tmp_path.rglob("run.json")
        assert RunFolder(file.parent).read()["status"] == "interrupted"
    done = launch("torchrun", *command)
    assert done.returncode == 0, done.stderr
    whole = finish(small_run(tmp_path / "whole", "bundled/tiny", *changes))
    sharded = RunFolder(tmp_path / "sharded" / whole.path.relative_to(tmp_path / "whole"))
    assert sharded.read()["init"]["relative_shift"] == pytest.approx(whole.read()["init"]["relative_shift"], rel=1e-5)
    for key in ("loss", "eval_loss"):
        expected, found = (
            [line[key] for line in read_lines(folder.metrics) if key in line] for folder in (whole, sharded)
        )
        assert found == pytest.approx(expected, rel=1e-4) and found
    expected, found = (load_file(folder.adapter / "adapter_model.safetensors") for folder in (whole, sharded))
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("init.direction=LoRA-GA", "LoRA-GA, which reads or changes"),
        ("init=pissa", "pissa, which reads or changes"),
        ("init=gaussian init.lora_B=gaussian", "LoRA, which reads or changes"),
        ("peft=dora", "needs the norms"),
        ("model.quantization=nf4", "remove one of the two"),
        ("model.saving=true", "run scripts/merge.py"),
        ("dataset.accuracy_examples=8", "set dataset.accuracy_examples=0"),
    ],
)
def test_rejects_features_not_possible_with_a_sharded_base(override, reason):
    with pytest.raises(UsageError, match=f"model.sharded=True does not work with .*{reason}"):
        run_config("model.sharded=true", "dataset.accuracy_examples=0", *override.split())


def test_sharded_base_needs_several_processes():
    with pytest.raises(UsageError, match=r"model\.sharded=True distributes the base.*start several"):
        experiment.execute(run_config("model.sharded=true", "dataset.accuracy_examples=0"))


@pytest.mark.parametrize("name", ["FSDP", "DeepSpeed"])
def test_sharding_by_accelerate_is_refused_before_anything_is_loaded(name, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    monkeypatch.setattr("lora_one.models.preflight", None)
    with pytest.raises(UsageError, match=f"enables {name}, which is not supported: .*model.sharded=true"):
        experiment.execute(run_config())


FILES = [ROOT / "accelerate_config.yaml", *(ROOT / "scripts/accelerate").glob("*.yaml")]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerate_reads_the_files(file):
    """By the launcher's own reader, which refuses a key that it does not know."""
    given = load_config_from_file(str(file))
    parsed = launch_command_parser().parse_args(["--config_file", str(file), "run_exp.py"])
    options = _validate_launch_command(parsed)[0]
    assert options.multi_gpu and options.mixed_precision == "no"
    assert options.num_processes == given.num_processes > 1 and options.num_machines == given.num_machines
