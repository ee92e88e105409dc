"""A base that is sharded over two processes and replicated on two others: start, losses and resume are those of one."""

import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from lora_one.files import read_lines
from lora_one.records.folder import RunFolder
from scripts.campaign.forked import forked
from tests.helpers.runs import finish, small_run

CHANGES = [
    "dataset.train_size=25",  # a last batch of one example: three of the processes have none
    "dataset.accuracy_examples=0",
    "model.per_device_batch_size=2",
    "model.gradient_checkpointing=true",
    "model.epochs=2",
    "model.eval_epochs=2",
    "optimizer=scaled_adamw",
]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the processes would each take a GPU; written for CPUs")
def test_two_copies_of_two_shards_give_the_results_of_one_process(tmp_path, monkeypatch):
    """Told to end after the first steps, they continue from their resume point."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # as if on two nodes
    command = [
        "wandb.mode=disabled",
        *CHANGES,
        "model.sharded=node",
        f"results_dir={tmp_path / 'four'}",
        f"init.cache={tmp_path / 'four/factors'}",
    ]
    command += ["dataset.validation_size=8", "model.real_batch_size=8"]
    first = forked(4, tmp_path / "first", *command)
    while not any('"loss"' in file.read_text() for file in tmp_path.rglob("metrics.jsonl")):
        assert not first.codes(), (first.errors, first.output(0))
        time.sleep(0.1)
    for rank in range(4):
        first.send(rank, signal.SIGTERM)
    first.wait(120)
    (file,) = tmp_path.rglob("run.json")
    four = RunFolder(file.parent)
    assert four.read()["status"] == "interrupted"
    again = forked(4, tmp_path / "again", *command)
    assert again.wait(300) == dict.fromkeys(range(4), 0), (again.errors, again.output(0))
    found = four.read()
    assert found["train"]["processes"] == 4 and found["config"]["model"]["sharded"] == 2

    one = finish(small_run(tmp_path / "one", "bundled/tiny", *CHANGES, f"init.cache={tmp_path / 'one/factors'}"))
    assert one.path.relative_to(tmp_path / "one") == four.path.relative_to(tmp_path / "four")
    expected = one.read()
    for key, tolerance in (("loss_after", 1e-6), ("relative_shift", 1e-5)):
        assert found["init"][key] == pytest.approx(expected["init"][key], rel=tolerance), key
    lines = [read_lines(folder.metrics) for folder in (one, four)]
    for key in ("loss", "eval_loss"):
        of_one, of_four = ([line[key] for line in part if key in line] for part in lines)
        assert of_four == pytest.approx(of_one, rel=1e-4) and of_four
    for pattern in ("factors/*.safetensors", "*/*/*/*/adapter/adapter_model.safetensors"):
        of_one, of_four = (tensors_of(tmp_path / part, pattern) for part in ("one", "four"))
        assert of_one.keys() == of_four.keys()
        for name, factor in of_one.items():
            torch.testing.assert_close(of_four[name], factor, rtol=1e-3, atol=1e-4)


def tensors_of(folder, pattern):
    (file,) = folder.glob(pattern)
    return load_file(file)
