"""A base that is sharded over two processes and replicated on two others: start, losses and resume are those of one."""

import pytest
import torch
from safetensors.torch import load_file

from lora_one.files import read_lines
from lora_one.records.folder import RunFolder
from scripts.campaign.forked import Fault, Forking
from tests.helpers.runs import finish, small_run

CHANGES = [
    "wandb.mode=disabled",
    "dataset.train_size=9",  # a second batch of one example: three of the processes have none
    "dataset.validation_size=5",
    "dataset.accuracy_examples=0",
    "model.real_batch_size=8",
    "model.per_device_batch_size=2",
    "model.save_steps=1",
    "init.scale=stable",
    "peft.lora_target_modules=[q_proj,down_proj]",
]
SECOND_STEP = Fault("lora_one.training.trainer:FineTuner.training_step", rank=3, call=2)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the processes would each take a GPU; written for CPUs")
def test_two_copies_of_two_shards_give_the_results_of_one_process(tmp_path, monkeypatch):
    """A process of the second copy is killed in the second step; all continue from the resume point."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # as if on two nodes
    command = [*CHANGES, "model.sharded=node", f"results_dir={tmp_path / 'four'}"]
    command += [f"init.cache={tmp_path / 'four/factors'}"]
    with Forking() as start:
        killed = start(4, tmp_path / "killed", *command, fault=SECOND_STEP)
        assert killed.wait(200) == {0: 1, 1: 1, 2: 1, 3: -9}, (killed.errors, killed.output(0))
        again = start(4, tmp_path / "again", *command)
        assert again.wait(200) == dict.fromkeys(range(4), 0), (again.errors, again.output(0))
    one = finish(small_run(tmp_path / "one", "bundled/tiny", *CHANGES, f"init.cache={tmp_path / 'one/factors'}"))

    four = RunFolder(tmp_path / "four" / one.path.relative_to(tmp_path / "one"))
    found, expected = four.read(), one.read()
    assert found["train"]["processes"] == 4 and found["config"]["model"]["sharded"] == 2
    assert found["init"]["loss_after"] == pytest.approx(expected["init"]["loss_after"], rel=1e-6)
    lines = [read_lines(folder.metrics) for folder in (one, four)]
    for key in ("loss", "eval_loss"):
        of_one, of_four = ([line[key] for line in part if key in line] for part in lines)
        assert of_four == pytest.approx(of_one, rel=1e-4) and of_four
    for pattern in ("factors/*.safetensors", "*/*/*/adapter/adapter_model.safetensors"):
        of_one, of_four = (tensors_of(tmp_path / part, pattern) for part in ("one", "four"))
        assert of_one.keys() == of_four.keys()
        for name, factor in of_one.items():
            torch.testing.assert_close(of_four[name], factor, rtol=1e-3, atol=1e-4)


def tensors_of(folder, pattern):
    (file,) = folder.glob(pattern)
    return load_file(file)
