"""Loading of models: the implementation of attention."""

import pytest
import torch

from lora_one.errors import RunError
from lora_one.models import load_model, loading
from tests.helpers.models import random_llama, random_t5


def test_attention_is_the_fastest_that_the_device_has(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: name == "flash_attn" or None)
    assert loading.attentions_for(torch.bfloat16, gpu) == ["flash_attention_2", "sdpa", "eager"]
    assert (
        loading.attentions_for(torch.float32, gpu) == loading.attentions_for(torch.bfloat16, cpu) == ["sdpa", "eager"]
    )


def test_a_model_without_flash_attention_is_loaded_with_another(tmp_path, monkeypatch):
    """As T5 on a GPU machine with flash-attn; transformers refuses it with an error."""
    random_t5().save_pretrained(tmp_path)
    monkeypatch.setattr(loading, "attentions_for", lambda *_: ["flash_attention_2", "sdpa", "eager"])
    model = load_model(str(tmp_path), dtype="bf16", where="cpu", model_type="ConditionalGeneration")
    assert model.config._attn_implementation in ("sdpa", "eager")


def test_an_error_that_is_not_about_attention_is_shown(tmp_path, monkeypatch):
    random_llama().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(RunError, match=r"weights of model .* cannot be loaded"):
        load_model(str(tmp_path), dtype="fp32", where="cpu")
