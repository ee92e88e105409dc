"""``AdapterCallback``: a Trainer saves the adapter for the original base."""

import warnings

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from lora_one import AdapterCallback, initialize_adapters, start_of_checkpoint
from lora_one.data.encode import batches_of
from lora_one.errors import RunError, UsageError
from tests.helpers.examples import examples
from tests.helpers.library import logits, lora
from tests.helpers.models import random_llama


def trained(model, folder, callback, steps=2, resume=None):
    rows = [{name: value[0] for name, value in batch.items()} for batch in batches_of(examples(8), 1, 0)]
    settings = TrainingArguments(
        output_dir=str(folder), max_steps=steps, save_steps=1, per_device_train_batch_size=1, learning_rate=1e-2,
        report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, settings, train_dataset=rows, callbacks=[callback])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pin_memory")
        trainer.train(resume_from_checkpoint=resume)


@pytest.mark.parametrize("method", ["lora_ga", "lora_one", "lora_xs"])
def test_the_callback_saves_for_the_original_base(method, tmp_path):
    """Without a warning for the Trainer's own checkpoints, from which it resumes."""
    model = initialize_adapters(random_llama(), lora(), batches_of(examples(8), 2, 0), method=method, examples=None)
    trained(model, tmp_path, AdapterCallback(data="random tokens"))
    loaded = logits(PeftModel.from_pretrained(random_llama(), tmp_path / "adapter"))
    torch.testing.assert_close(loaded, logits(model), rtol=1e-4, atol=1e-4)
    assert (tmp_path / "checkpoint-2/adapter_model.safetensors").exists()
    assert "random tokens" in (tmp_path / "adapter/README.md").read_text()
    if method != "lora_one":
        with pytest.warns(UserWarning, match="lora_one.save_adapter"):
            model.save_pretrained(tmp_path / "plain")


@pytest.mark.parametrize("path", ["out", ".", "out/../out"])
def test_the_folder_of_the_trainer_is_refused(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = initialize_adapters(random_llama(), lora(), method="pissa")
    with pytest.raises(
        UsageError, match=r"path=.* is the Trainer's output_dir=out, or .*: pass another folder, or None"
    ):
        trained(model, "out", AdapterCallback(path))


NEEDED = {"lora_sb": {"eta": 1e-3}}


def started(method, seed=3, **settings):
    batches = batches_of(examples(8, seed=seed), 2, 0)
    settings = NEEDED.get(method, {}) | settings
    return initialize_adapters(random_llama(), lora(), batches, method=method, examples=None, **settings)


def weights_in(folder):
    return load_file(folder / "adapter/adapter_model.safetensors")


def assert_equal(found, expected):
    """In values and dtypes."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype and torch.equal(value, expected[name]), name


METHODS = ["lora_one", "pissa", "lora_ga", "lora_sb", "lora_xs"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_training_ends_as_an_undisturbed_one(method, dtype, tmp_path):
    """Bit for bit, in the dtype of the adapter."""
    model = started(method, dtype=dtype)
    trained(model, tmp_path / "whole", AdapterCallback(), steps=4)
    resumed = started(method, dtype=dtype)
    trained(
        resumed, tmp_path / "whole", AdapterCallback(tmp_path / "second/adapter"), 4, tmp_path / "whole/checkpoint-2"
    )
    assert_equal(weights_in(tmp_path / "second"), weights_in(tmp_path / "whole"))
    assert_equal(resumed.state_dict(), model.state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_the_start_of_another_training_is_refused_where_it_matters(method, tmp_path):
    """LoRA-SB and LoRA-XS also load their frozen factors."""
    trained(started(method), tmp_path, AdapterCallback(), steps=4)
    whole = weights_in(tmp_path)
    other = started("lora_one" if method == "pissa" else method, seed=4)
    if method in ("pissa", "lora_ga"):
        with pytest.raises(
            RunError, match=r"checkpoint-2 was trained with another start: .*\(4 layers .*start_of_check"
        ):
            trained(other, tmp_path, AdapterCallback(), 4, tmp_path / "checkpoint-2")
        other = initialize_adapters(random_llama(), lora(), method=start_of_checkpoint(tmp_path / "checkpoint-2"))
    trained(other, tmp_path, AdapterCallback(), 4, tmp_path / "checkpoint-2")
    assert_equal(weights_in(tmp_path), whole)


def test_a_checkpoint_without_its_start_cannot_be_checked(tmp_path):
    trained(started("pissa"), tmp_path, AdapterCallback())
    (tmp_path / "checkpoint-1/initial_factors.safetensors").unlink()
    with pytest.warns(UserWarning, match=r"initial_factors\.safetensors does not exist, so it cannot be checked"):
        trained(started("pissa"), tmp_path, AdapterCallback(), resume=tmp_path / "checkpoint-1")
    with pytest.raises(UsageError, match=r"does not exist: .* call initialize_adapters with the same method"):
        start_of_checkpoint(tmp_path / "checkpoint-1")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_loaded_adapter_keeps_the_dtype_of_the_model(dtype, tmp_path):
    model = started("lora_one", dtype=dtype)
    model.save_pretrained(tmp_path)
    other = started("lora_one", seed=4, dtype=dtype)
    other.load_adapter(tmp_path, "default", is_trainable=True)
    assert_equal(other.state_dict(), model.state_dict())
    assert any(parameter.requires_grad for parameter in other.parameters())
