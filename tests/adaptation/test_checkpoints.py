"""Saving and restoring adapters."""

import pytest
import torch

from lora_one.adaptation.checkpoints import load_adapter, restore_adapter, save_adapter
from lora_one.adaptation.wrapping import wrap
from lora_one.errors import RunError, UsageError
from lora_one.files import whole_folder
from tests.helpers.models import random_llama
from tests.helpers.runs import run_config
from tests.helpers.training import adapted_llama

IDS = torch.arange(3, 40).reshape(1, -1)


def test_adapter_of_another_model_is_refused(tmp_path):
    save_adapter(adapted_llama(), tmp_path / "adapter")
    with pytest.raises(UsageError, match="does not fit this model"):
        load_adapter(random_llama(intermediate_size=64), tmp_path / "adapter")
    for layers, reason in ((1, "14 of its tensors are not in the model"), (3, "14 tensors of the model")):
        with pytest.raises(UsageError, match=f"does not fit this model .*{reason}"):
            load_adapter(random_llama(num_hidden_layers=layers), tmp_path / "adapter")
    with pytest.raises(UsageError, match=r"contains no adapter_config\.json"):
        load_adapter(random_llama(), tmp_path)


def test_resume_point_is_restored_in_place_and_in_its_own_dtype(tmp_path):
    """The parameters that the optimizer knows get the values; PEFT's own way would leave fp32 copies instead."""
    peft = run_config("init=default").peft
    model, other = (wrap(random_llama(), peft, "bf16") for _ in range(2))
    before = {name: parameter for name, parameter in other.named_parameters() if "lora_" in name}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(tmp_path)
    restore_adapter(other, tmp_path)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert other.get_parameter(name) is before[name] and before[name].dtype == torch.bfloat16
            assert torch.equal(before[name], parameter)


def test_resume_point_of_another_adapter_is_refused(tmp_path):
    adapted_llama().save_pretrained(tmp_path)
    core = wrap(random_llama(), run_config("init=lora_xs").peft, "fp32")
    with pytest.raises(RunError, match="an adapter with other layers than this run: remove it, or add overwrite=true"):
        restore_adapter(core, tmp_path)


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    place = tmp_path / "adapter"
    with whole_folder(place) as folder:
        (folder / "old").touch()
    with pytest.raises(ZeroDivisionError), whole_folder(place) as folder:
        (folder / "new").touch()
        raise ZeroDivisionError
    assert [file.name for file in place.iterdir()] == ["old"]
    with pytest.raises(RunError, match=r"cannot be written \(No space left"), whole_folder(place):
        raise OSError(28, "No space left on device")
    assert [file.name for file in tmp_path.iterdir()] == ["adapter"], "nothing is left lying about"
