"""``initialize_adapters`` leaves the model and the global random numbers as they were."""

import random

import numpy as np
import pytest
import torch

from lora_one import AdapterFactors, initialize_adapters
from lora_one.config.defaults import choices_of_init
from lora_one.data.encode import batches_of
from lora_one.errors import RunError, UsageError
from lora_one.initialization import library
from lora_one.initialization.methods import peft_methods
from tests.helpers.examples import examples
from tests.helpers.library import NEEDED, lora
from tests.helpers.models import random_llama
from tests.helpers.structure import structure

BY_PEFT = ["corda", "eva", "lora_ga_peft", "olora"]

pytestmark = [
    pytest.mark.usefixtures("attrs_package"),
    pytest.mark.filterwarnings("ignore:Model has .tie_word", "ignore:Setting `save_embedding_layers`"),
]


def batches():
    return batches_of(examples(), 2, 0)


def fails(layer, step):
    raise ValueError("no result")


def fails_later(layer, step):
    if "layers.1" in layer.name:
        raise KeyboardInterrupt
    return AdapterFactors(torch.ones(layer.shape[0], layer.rank), torch.ones(layer.rank, layer.shape[1]), True)


EMBEDDINGS = {"modules_to_save": ["embed_tokens"]}
CONFIGS = [{}, {"modules_to_save": ["lm_head"]}, EMBEDDINGS, EMBEDDINGS | {"ensure_weight_tying": True}]


def unchanged_after(base, config, error, **settings):
    """Assert that this call fails and leaves the base as it was, with all its weights."""
    before, weights = structure(base), {name: value.clone() for name, value in base.state_dict().items()}
    with pytest.raises(error):
        initialize_adapters(base, config, batches(), examples=None, **settings)
    assert structure(base) == before
    assert all(torch.equal(value, weights[name]) for name, value in base.state_dict().items())


@pytest.mark.parametrize("config", CONFIGS, ids=["plain", "head", "embeddings", "tied embeddings"])
@pytest.mark.parametrize("method", [fails, fails_later, *BY_PEFT, "pissa"])
def test_a_failed_call_leaves_the_model_unchanged(method, config, monkeypatch):
    def fail(*_):
        raise RunError("no result")

    monkeypatch.setattr(peft_methods, "_read", fail)
    if method == "pissa":
        monkeypatch.setattr(library, "place", fail)
    base = random_llama(tie_word_embeddings=True).requires_grad_(True)
    base.model.layers[0].train()
    unchanged_after(base, lora(**config), (RunError, KeyboardInterrupt), method=method)


@pytest.mark.parametrize("method", ["corda", "lora_one"])
def test_a_layer_that_is_not_used_leaves_the_model_unchanged(method):
    base = random_llama()
    base.model.layers[0].extra = torch.nn.Linear(32, 32)
    unchanged_after(base, lora(target_modules=["q_proj", "extra"]), RunError, method=method)


@pytest.mark.parametrize("config", [{"target_modules": ["q_proj", "input_layernorm"]}, {"r": 64}])
def test_a_wrong_target_leaves_the_model_unchanged(config):
    unchanged_after(random_llama(), lora(**config), UsageError, method="lora")


@pytest.mark.parametrize("method", BY_PEFT)
def test_methods_of_peft_leave_no_trace_but_the_adapters(method):
    names = {name: sorted(vars(module)) for name, module in random_llama().named_modules()}
    model = initialize_adapters(random_llama(), lora(), batches(), examples=None, method=method).unload()
    for name, module in model.named_modules():
        assert set(vars(module)) - set(names[name]) <= {"is_hf_initialized"}, name
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("method", sorted(set(choices_of_init().values()) - {"loftq"}))
def test_the_global_random_numbers_depend_on_the_caller_s_seed_only(method):
    """PEFT wraps the model with random numbers, as in get_peft_model; no method seeds them."""

    def numbers(seed):
        base = random_llama()
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        initialize_adapters(base, lora(), batches(), examples=None, method=method, **NEEDED.get(method, {}))
        assert torch.initial_seed() == seed
        return random.random(), np.random.random(), float(torch.rand(1))

    assert all(one != two for one, two in zip(numbers(1), numbers(2), strict=True))
    assert numbers(1) == numbers(1)
    random.seed(1), np.random.seed(1)
    expected = random.random(), np.random.random()
    assert numbers(1)[:2] == expected
