"""MiLoRA against the exact SVD of the weight."""

import pytest
import torch

from lora_one.errors import RunError
from lora_one.types import LayerView
from tests.helpers.models import random_llama
from tests.helpers.runs import attach_llama, run_config, start_of

R, S = 5, 4.0


def weight(m, n):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(5))


def start(W, rank=R, scaling=S):
    layer = LayerView("layer", tuple(W.shape), lambda: W, rank, scaling, torch.Generator().manual_seed(0))
    return start_of(run_config("init=milora").init, layer)


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (20, 20)], ids=str)
def test_the_adapter_is_the_smallest_part_of_the_weight(shape):
    W = weight(*shape)
    U, sigma, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    factors = start(W)
    expected = (U[:, -R:] * sigma[-R:] @ Vh[-R:]).float()
    torch.testing.assert_close(S * factors.B @ factors.A, expected, rtol=1e-4, atol=1e-6)
    # balanced: each factor carries the root of S / s
    torch.testing.assert_close(factors.B.T @ factors.B, torch.diag(sigma[-R:].float() / S), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(factors.A @ factors.A.T, torch.diag(sigma[-R:].float() / S), rtol=1e-4, atol=1e-6)
    assert factors.shift_base


def test_the_base_keeps_nothing_in_the_directions_of_the_adapter():
    """B^T (W - s B A) = 0 and (W - s B A) A^T = 0."""
    W = weight(24, 16)
    factors = start(W)
    kept = W - S * factors.B @ factors.A
    torch.testing.assert_close(factors.B.T @ kept, torch.zeros(R, 16), rtol=0, atol=1e-5)
    torch.testing.assert_close(kept @ factors.A.T, torch.zeros(24, R), rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.linalg.svdvals(kept)[:11], torch.linalg.svdvals(W)[:11])


def test_no_other_triplets_are_smaller():
    W = weight(24, 16)
    sigma, factors = torch.linalg.svdvals(W), start(W)
    assert float(S * (factors.B @ factors.A).norm()) == pytest.approx(float(sigma[-R:].norm()), rel=1e-5)


def test_the_product_does_not_depend_on_the_scaling():
    one, other = start(weight(24, 16), scaling=1.0), start(weight(24, 16), scaling=7.0)
    torch.testing.assert_close(one.B @ one.A, 7.0 * other.B @ other.A)


def test_small_singular_values_are_found_next_to_large_ones():
    """Spectrum from 1 to 1e-5: the last directions are those of the exact SVD."""
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(side, 12, generator=generator).double()).Q for side in (30, 20))
    sigma = torch.logspace(0, -5, 12, dtype=torch.float64)
    W = (U * sigma @ V.T)[:, :12]  # (30, 12)
    last = torch.linalg.svd(W, full_matrices=False)
    factors = start(W.float(), rank=2)
    expected = (last.U[:, -2:] * last.S[-2:] @ last.Vh[-2:]).float()
    assert (S * factors.B @ factors.A - expected).norm() <= 0.05 * expected.norm()


def test_a_zero_direction_is_refused_because_it_could_not_be_trained():
    W = weight(24, 13) @ weight(13, 16)  # rank 13 of 16
    with pytest.raises(ValueError, match=r"3 of the last 5 singular values of layer are zero.*set init=lora"):
        start(W)
    base = random_llama()
    base.get_submodule("model.layers.1.mlp.up_proj").weight.data[:, :3] = 0
    with pytest.raises(RunError, match=r"init: 3 of the last 8 singular values of model\.layers\.1\.mlp\.up_proj"):
        attach_llama("init=milora", base=base)
