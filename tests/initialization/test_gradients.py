"""The mean gradient against autograd's gradient of the full weights."""

import pytest
import torch

from lora_one.data.encode import batches_of
from lora_one.initialization import gradients
from lora_one.initialization.gradients import mean_gradients, product
from tests.helpers.examples import answer_tokens, autograd_gradients, examples, linear_layers
from tests.helpers.models import random_llama


def ours(model, data, reduction="example", batch_size=2):
    found = {}
    batches = batches_of(data, batch_size, 0)
    report = mean_gradients(model, linear_layers(model), batches, reduction, found.__setitem__)
    return found, report


@pytest.mark.parametrize("reduction", ["example", "token"])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_equals_autograd(llama, reduction, batch_size):
    data = examples()
    expected = autograd_gradients(llama, data, reduction)
    found, report = ours(llama, data, reduction, batch_size)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    assert (report.examples, report.tokens) == (5, sum(answer_tokens(e) for e in data))


def test_weights_get_no_gradients(llama):
    llama.model.norm.weight.requires_grad_(True)
    ours(llama, examples())
    assert all(parameter.grad is None for parameter in llama.parameters())
    assert [n for n, p in llama.named_parameters() if p.requires_grad] == ["model.norm.weight"]
    assert not any(layer._forward_hooks for layer in llama.modules())


def test_dropout_is_off_and_the_mode_comes_back():
    model = random_llama(attention_dropout=0.5).train()
    one, _ = ours(model, examples())
    two, _ = ours(model, examples())
    assert model.training
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_sum_over_batches_is_kept_in_fp32_for_a_bf16_model():
    """A bf16 running sum over many batches would drift; ours stays at the error of the bf16 passes themselves."""
    model, data = random_llama().bfloat16(), examples(16)  # a power of two: sharing the loss out rounds nothing
    found, _ = ours(model, data, batch_size=1)
    expected = autograd_gradients(random_llama(), data, "example")
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error < 0.03, (name, float(error))
    # the sum of single-example gradients, taken in fp64, is what the accumulation must give to fp32 precision
    singles = [ours(model, [example])[0] for example in data]
    for name, gradient in found.items():
        total = sum(single[name].double() for single in singles) / len(data)
        assert (gradient - total).norm() / total.norm() < 2e-3, name


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_are_summed_in_fp32(device, dtype):
    """dY^T X of 4,096 tokens to fp32's precision, of 16-bit inputs too."""
    generator = torch.Generator().manual_seed(0)
    dY, X = (torch.randn(4096, size, generator=generator).to(device, dtype) for size in (40, 24))
    expected = dY.double().T @ X.double()
    found = product(dY, X)
    assert found.dtype == torch.float32
    assert (found - expected).norm() <= 1e-6 * expected.norm()


def test_gradients_are_handed_over_one_by_one(llama):
    """Each layer's G can be freed before the next one comes."""
    seen = []
    mean_gradients(llama, linear_layers(llama), batches_of(examples(), 2, 0), "example", lambda n, g: seen.append(n))
    assert seen == list(linear_layers(llama))


def test_unused_layer_is_named(llama):
    layers = linear_layers(llama) | {"spare": torch.nn.Linear(4, 4)}
    with pytest.raises(ValueError, match="layer spare got no gradient"):
        mean_gradients(llama, layers, batches_of(examples(), 2, 0), "example", lambda n, g: None)


def test_loss_that_is_not_finite_is_an_error(llama):
    llama.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="loss on the initialisation examples is nan"):
        ours(llama, examples())


class Turns:
    """The second of three processes, which notes what it does."""

    rank, count = 1, 3

    def __init__(self):
        self.done = []

    def by_turns(self, names):
        return ((index % self.count, name) for index, name in enumerate(names))

    def sum_to(self, owner, tensor):
        self.done.append(f"sum for {owner}")
        return tensor


def test_one_layer_for_each_process_is_summed_before_any_is_consumed(monkeypatch):
    """Otherwise each process would wait with the next sum until the one before it has factorised its layer."""
    turns = Turns()
    monkeypatch.setattr(gradients.Processes, "current", lambda: turns)
    layers = {name: torch.nn.Linear(3, 2, device="meta") for name in "abcde"}
    sums = gradients.BatchSums("cpu", torch.float64, {name: torch.full((2, 3), ord(name)) for name in "abcde"})

    def consume(name, G):
        turns.done.append(f"consume {name}")
        assert G.device.type == "meta" and G.dtype == torch.float32, "on the device of the layer, in the model's dtype"

    gradients.hand_out(sums, layers, torch.float32, consume)
    before = ["sum for 0", "sum for 1", "sum for 2"]
    assert turns.done == [*before, "consume b", "sum for 0", "sum for 1", "consume e"]
    assert not sums.totals
