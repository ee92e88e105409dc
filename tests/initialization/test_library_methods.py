"""``initialize_adapters`` with every method, and what saving its result writes."""

import json
import warnings

import pytest
import torch
from peft import PeftModel

from lora_one import AdapterFactors, initialize_adapters, save_adapter
from lora_one.adaptation import layers as adapters
from lora_one.config.defaults import choices_of_init
from lora_one.data.encode import batches_of
from tests.helpers.examples import examples
from tests.helpers.library import NEEDED, assert_close, logits, lora, move
from tests.helpers.models import quantized_llama, random_llama

CHOICES = sorted(set(choices_of_init().values()))

pytestmark = pytest.mark.usefixtures("attrs_package")


def half_own(layer, step):
    """LoRA-One with half of the step, on the way back from a changed base."""
    return AdapterFactors(step.U * step.S, 0.5 * step.Vh, shift_base=True)


@pytest.fixture
def base_of(tmp_path):
    """The random model, quantised for the method that is about that."""

    def base(method):
        if method == "loftq":
            return quantized_llama(tmp_path / "base", hidden_size=64, intermediate_size=128)[0]
        return random_llama()

    return base


@pytest.mark.parametrize("method", [*CHOICES, half_own], ids=lambda m: getattr(m, "__name__", m))
@pytest.mark.parametrize("rslora", [True, False])
def test_plain_peft_loads_what_every_method_trained(method, rslora, tmp_path, base_of):
    """On the original base: the logits of the trained model. Plain saving warns if its logits would be others."""
    base = base_of(method)
    original = logits(base)
    batches = batches_of(examples(), 2, 0)
    model = initialize_adapters(
        base, lora(use_rslora=rslora), batches, method=method, examples=None, **NEEDED.get(method, {})
    )
    move(model)
    trained = logits(model)
    save_adapter(model, tmp_path / "adapter")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.save_pretrained(tmp_path / "plain")
    warned = any("lora_one.save_adapter" in str(warning.message) for warning in caught)
    assert_close(logits(PeftModel.from_pretrained(base_of(method), tmp_path / "adapter")), trained)
    assert (original - trained).abs().max() > 1e-2 * trained.abs().max()
    if not warned:
        assert_close(logits(PeftModel.from_pretrained(base_of(method), tmp_path / "plain")), trained)
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["init_lora_weights"] is True
    shifting = {"corda", "lora_ga", "lora_ga_peft", "loram", "milora", "olora", "pissa", "random_ab", "svd"}
    assert warned == (method in shifting | {"lora_sb", "lora_xs", half_own})


@pytest.mark.parametrize("name", ["LoRA-GA", "lora_ga"])
def test_both_names_of_a_method_are_the_same(name):
    model = initialize_adapters(random_llama(), lora(), batches_of(examples(), 2, 0), method=name, examples=None)
    other = initialize_adapters(random_llama(), lora(), batches_of(examples(), 2, 0), method="lora_ga", examples=None)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_one_batch_a_list_and_a_loader_are_the_same():
    (batch,) = batches_of(examples(), 5, 0)
    rows = batches_of(examples(), 1, 0)
    results = [
        initialize_adapters(random_llama(), lora(), given, examples=None) for given in (batch, [batch], iter(rows))
    ]
    for parts in zip(*(model.parameters() for model in results), strict=True):
        assert torch.equal(parts[0], parts[1])
        torch.testing.assert_close(parts[0], parts[2], rtol=1e-3, atol=1e-5)


def test_methods_without_examples_need_no_batches():
    model = initialize_adapters(random_llama(), lora(), method="pissa")
    for name, layer in adapters.lora_layers(model).items():
        U, S, Vh = torch.linalg.svd(random_llama().get_submodule(name).weight)
        product = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        torch.testing.assert_close(product.detach(), U[:, :4] * S[:4] @ Vh[:4], rtol=1e-3, atol=1e-3)


def test_an_own_method_gets_the_layer_and_its_step():
    """B A is what the function returns; without batches there is no step."""
    seen = []

    def mine(layer, step):
        seen.append(step)
        m, n = layer.shape
        return AdapterFactors(torch.ones(m, layer.rank), torch.full((layer.rank, n), 1e-3))

    model = initialize_adapters(random_llama(), lora(), method=mine)
    assert seen == [None] * 4
    assert all((layer.lora_A["default"].weight == 1e-3).all() for layer in adapters.lora_layers(model).values())
    seen.clear()
    initialize_adapters(random_llama(), lora(), batches_of(examples(), 2, 0), method=mine, examples=None, vectors=2)
    assert [step.S.shape for step in seen] == [(8,)] * 4


def test_a_core_is_all_that_trains():
    model = initialize_adapters(random_llama(), lora(), method="lora_xs")
    trained = {name: value.shape for name, value in model.named_parameters() if value.requires_grad}
    assert set(trained.values()) == {(4, 4)} and len(trained) == 4
