"""The weight's own singular vectors."""

import pytest
import torch

from lora_one.types import LayerView
from tests.helpers.runs import run_config, start_of

M, N, R, S = 24, 16, 4, 3.0
W = torch.randn(M, N, generator=torch.Generator().manual_seed(5))


def start(*overrides):
    layer = LayerView("layer", (M, N), lambda: W, R, S, torch.Generator().manual_seed(0))
    return start_of(run_config("init=svd", *overrides).init, layer)


def test_default_is_pissa():
    """s B A is the best rank-r approximation of W, so the base keeps the rest."""
    U, sigma, Vh = torch.linalg.svd(W)
    factors = start()
    torch.testing.assert_close(S * factors.B @ factors.A, U[:, :R] * sigma[:R] @ Vh[:R], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(factors.B.T @ factors.B, factors.A @ factors.A.T, rtol=1e-4, atol=1e-5)
    assert factors.shift_base


def test_scales():
    sigma = torch.linalg.svdvals(W)[:R]
    unit, stable, normalized = (start(f"init.scale={scale}") for scale in ("unit", "stable", "normalized"))
    torch.testing.assert_close(unit.B.T @ unit.B, torch.eye(R), rtol=0, atol=1e-5)
    torch.testing.assert_close(stable.B, unit.B * M**0.25 / 4)
    torch.testing.assert_close(stable.A, unit.A * N**0.25 / 4)
    torch.testing.assert_close(normalized.B, unit.B * (sigma / sigma.sum()).sqrt())
    assert float((normalized.B @ normalized.A).trace() if M == N else normalized.B.square().sum()) == pytest.approx(
        1, rel=1e-4
    )
