"""``AdapterCallback``: a Trainer saves the adapter for the original base."""

import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import Trainer, TrainingArguments

from lora_one import AdapterCallback, initialize_adapters
from lora_one.data.encode import batches_of
from lora_one.errors import UsageError
from tests.helpers.examples import examples
from tests.helpers.models import random_llama


def lora():
    return LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])


@torch.no_grad()
def logits(model):
    return model.eval()(torch.arange(3, 40).reshape(1, -1)).logits


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
