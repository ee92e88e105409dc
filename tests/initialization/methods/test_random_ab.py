"""Init[AB]: the distribution of both factors, with and without the changed base."""

import pytest
import torch

from lora_one.adaptation import layers as adapters
from lora_one.types import LayerView
from tests.helpers.models import random_llama
from tests.helpers.runs import attach_llama, run_config, start_of

M, N, R = 600, 400, 8
IDS = torch.arange(3, 40).reshape(1, -1)


def start(*overrides, seed=0):
    layer = LayerView("layer", (M, N), lambda: None, R, 4.0, torch.Generator().manual_seed(seed))
    return start_of(run_config("init=random_ab", *overrides).init, layer)


@pytest.mark.parametrize("c", [1.0, 0.5])
def test_both_factors_are_uniform_and_n_is_that_of_the_inputs(c):
    factors = start(f"init.bound={c}")
    for factor in (factors.B, factors.A):
        assert factor.abs().max() <= c / N**0.5 and factor.abs().max() > 0.99 * c / N**0.5
        assert float(factor.square().mean()) == pytest.approx(c**2 / (3 * N), rel=0.05)
    assert not torch.equal(factors.B[:8, :8], factors.A[:8, :8])


@pytest.mark.parametrize("c", [1.0, 0.5])
def test_the_size_of_the_product(c):
    """E ||B A||_F^2 = c^4 m r / (9 n)."""
    squares = [float((f.B @ f.A).square().sum()) for f in (start(f"init.bound={c}", seed=i) for i in range(20))]
    assert sum(squares) / 20 == pytest.approx(c**4 * M * R / (9 * N), rel=0.05)


@torch.no_grad()
def test_with_reset_the_function_is_unchanged_and_without_it_is_not():
    pretrained = random_llama()(IDS).logits
    kept, start_kept = attach_llama("init=random_ab")
    moved, start_moved = attach_llama("init=random_ab", "init.reset=false")
    assert (kept(IDS).logits - pretrained).abs().max() <= 1e-4 * pretrained.abs().max()
    assert (moved(IDS).logits - pretrained).abs().max() > 1e-2 * pretrained.abs().max()
    assert start_kept.initial_factors and not start_moved.initial_factors
    for one, other in zip(adapters.lora_layers(kept).values(), adapters.lora_layers(moved).values(), strict=True):
        assert torch.equal(one.lora_B["default"].weight, other.lora_B["default"].weight)


def test_both_factors_get_a_gradient_at_once():
    """Unlike B = 0, whose gradient of A is zero."""
    model, _ = attach_llama("init=random_ab")
    model(IDS, labels=IDS).loss.backward()
    assert all(value.grad.any() for name, value in model.named_parameters() if "lora_" in name)


def test_the_name_says_what_differs():
    names = [run_config("init=random_ab", *more).init.folder_parts(16) for more in ((), ("init.reset=false",))]
    assert names == [["a16", "c1"], ["a16", "c1", "no-reset"]]
