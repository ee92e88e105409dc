"""LoRA-XS against the exact SVD of the weight."""

import pytest
import torch

from lora_one.types import LayerView
from tests.helpers.runs import run_config, start_of

R = 8


def weight(m, n):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(5))


def start(W, *overrides, rank=R):
    layer = LayerView("layer", tuple(W.shape), lambda: W, rank, 2.0, torch.Generator().manual_seed(0))
    return start_of(run_config("init=lora_xs", *overrides).init, layer)


def test_frozen_factors_hold_the_weight_s_best_approximation():
    """B = U_r is orthonormal, A = diag(S_r) Vh_r carries the singular values; B A = [W]_r."""
    W = weight(40, 24)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    factors = start(W)
    torch.testing.assert_close(factors.B @ factors.A, U[:, :R] * S[:R] @ Vh[:R], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(factors.B.T @ factors.B, torch.eye(R), rtol=0, atol=1e-5)
    torch.testing.assert_close(factors.A @ factors.A.T, torch.diag(S[:R] ** 2), rtol=1e-4, atol=1e-3)
    assert not factors.shift_base


def test_randomised_svd_captures_the_weight():
    W = weight(400, 300)
    S = torch.linalg.svdvals(W)
    factors = start(W)
    missed = (W - factors.B @ factors.A).square().sum() - S[R:].square().sum()
    assert missed <= 1e-3 * S[:R].square().sum()
    torch.testing.assert_close(factors.A.norm(dim=1), S[:R], rtol=1e-2, atol=0)


@pytest.mark.parametrize("std", [1e-5, 0.3])
def test_core_is_small_and_random(std):
    """R ~ N(0, std^2); the published std is 1e-5, whose square is the variance 1e-10."""
    changes = [] if std == 1e-5 else [f"init.lora_R_std={std}"]
    core = start(weight(80, 90), *changes, rank=64).R
    assert core.shape == (64, 64)
    assert core.std() == pytest.approx(std, rel=0.05) and abs(core.mean()) < 0.05 * std


def test_scaling_is_as_peft_says():
    peft = run_config("init=lora_xs", "peft.lora_alpha=32", "peft.use_rslora=false").peft
    assert peft.lora_xs and (peft.lora_alpha, peft.use_rslora) == (32, False)
