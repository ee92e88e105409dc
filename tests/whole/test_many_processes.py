"""Eight and sixteen processes: the start, every loss and the validation are those of one process."""

import pytest
import torch
from safetensors.torch import load_file

from lora_one.files import read_lines
from lora_one.records.folder import RunFolder
from tests.helpers.runs import finish, small_run

CHANGES = [
    "dataset.train_size=70",  # a last batch of 6 examples: most of 16 processes have none
    "dataset.validation_size=8",
    "dataset.accuracy_examples=4",
    "dataset.max_new_tokens=8",
    "model.real_batch_size=16",
    "model.per_device_batch_size=1",
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return folder, finish(small_run(folder, "bundled/tiny", *CHANGES))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the processes would each take a GPU; written for CPUs")
@pytest.mark.parametrize("count", [pytest.param(8, marks=pytest.mark.long), 16])
def test_many_processes_give_the_results_of_one(alone, count, forking, tmp_path):
    top, one = alone
    processes = forking(count, tmp_path / "out", "wandb.mode=disabled", *CHANGES, f"results_dir={tmp_path / 'many'}")
    assert processes.wait(500) == dict.fromkeys(range(count), 0), (processes.errors, processes.output(0))
    many = RunFolder(tmp_path / "many" / one.path.relative_to(top))
    expected, found = one.read(), many.read()
    assert found["train"]["processes"] == count and found["train"]["tokens"] == expected["train"]["tokens"]
    for key, tolerance in (("loss_after", 1e-6), ("relative_shift", 1e-5), ("predicted_decrease", 1e-4)):
        assert found["init"][key] == pytest.approx(expected["init"][key], rel=tolerance), key
    lines = [read_lines(folder.metrics) for folder in (one, many)]
    for key in ("loss", "eval_loss", "eval_accuracy"):
        of_one, of_many = ([line[key] for line in part if key in line] for part in lines)
        assert of_many == pytest.approx(of_one, rel=1e-4) and of_many
    of_one, of_many = (load_file(folder.adapter / "adapter_model.safetensors") for folder in (one, many))
    for name, factor in of_one.items():
        torch.testing.assert_close(of_many[name], factor, rtol=1e-3, atol=1e-4)
