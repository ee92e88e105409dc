"""A model's structure is restored exactly."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lora_one.adaptation.structure import unchanged_on_error
from tests.helpers.models import random_llama
from tests.helpers.structure import structure


def test_everything_but_values_is_restored():
    model = random_llama(tie_word_embeddings=True).requires_grad_(True)
    model.model.layers[0].train()
    handle = model.lm_head.register_forward_hook(lambda *_: None)
    before = structure(model)
    config = LoraConfig(
        target_modules=["q_proj"], layer_replication=[[0, 2], [0, 1]], modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,
    )  # fmt: skip
    with pytest.raises(ZeroDivisionError), unchanged_on_error(model):
        get_peft_model(model, config).train()
        model.model.norm.register_buffer("extra", torch.zeros(1))
        model.model.norm.register_forward_hook(lambda *_: None)
        model.model.layers[0].note = 1
        model.model.norm.weight.grad = torch.ones(32)
        assert structure(model) != before
        raise ZeroDivisionError
    assert structure(model) == before
    handle.remove()
    assert not model.lm_head._forward_hooks


def test_a_change_without_an_error_stays():
    model = random_llama()
    with unchanged_on_error(model):
        model.note = 1
    assert model.note == 1
