"""LoRAM against its definition, written out entry by entry."""

import math

import pytest
import torch

from lora_one.errors import UsageError
from lora_one.initialization.methods.loram import sines
from lora_one.types import LayerView
from tests.helpers.library import lora
from tests.helpers.models import random_llama
from tests.helpers.runs import attach_llama, run_config, start_of

M, N, R = 24, 16, 4
W = torch.randn(M, N, generator=torch.Generator().manual_seed(5))


def start(weight=W, rank=R, scaling=1.0, seed=0):
    layer = LayerView("layer", (M, N), lambda: weight, rank, scaling, torch.Generator().manual_seed(seed))
    return start_of(run_config("init=loram").init, layer)


def test_the_basis_is_the_discrete_sine_transform():
    Phi = sines(7, 3)
    for i in range(7):
        for j in range(3):
            expected = math.sqrt(2 / 8) * math.sin((i + 1) * (j + 1) * math.pi / 8)
            assert float(Phi[i, j]) == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(sines(4096, 64).T @ sines(4096, 64), torch.eye(64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [2, R, N])
@pytest.mark.parametrize("scaling", [1.0, 5.0])
def test_magnitude_and_balance(rank, scaling):
    """s B^T B = s A A^T = beta^2 I and ||s B A||_F = Q^1/2 ||W||_F with Q = ln r / ln min(m, n)."""
    factors = start(rank=rank, scaling=scaling)
    Q = math.log(rank) / math.log(N)
    beta = (Q * float(W.norm()) ** 2 / rank) ** 0.25
    for gram in (factors.B.T @ factors.B, factors.A @ factors.A.T):
        torch.testing.assert_close(scaling * gram, beta**2 * torch.eye(rank), rtol=1e-4, atol=1e-4)
    assert float(scaling * (factors.B @ factors.A).norm()) == pytest.approx(math.sqrt(Q) * float(W.norm()), rel=1e-4)
    assert factors.shift_base


def test_only_the_norm_of_the_weight_matters():
    """Neither a seed nor the directions of W."""
    one, other = start(), start(weight=W.flip(0).flip(1), seed=9)
    torch.testing.assert_close(one.B, other.B)
    torch.testing.assert_close(one.A, other.A)
    torch.testing.assert_close(start(weight=4 * W).B, 2 * one.B)


def test_rank_one_is_refused_before_any_weight_is_read():
    """Q = 0, so both factors would be zero."""
    with pytest.raises(UsageError, match=r"peft\.lora_r=1 gives zero factors with init=loram.*lora_r=2 or more"):
        attach_llama("init=loram", "peft.lora_r=1")
    from lora_one import initialize_adapters

    with pytest.raises(UsageError, match=r"^r=1 gives zero factors"):
        initialize_adapters(random_llama(), lora(r=1), method="loram")


def test_a_zero_weight_is_refused():
    with pytest.raises(ValueError, match="the weight of layer is zero"):
        start(weight=torch.zeros(M, N))
