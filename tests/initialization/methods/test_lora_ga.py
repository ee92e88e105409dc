"""LoRA-GA against its authors' formulas with the exact SVD; PEFT's own variant differs and is no reference."""

import pytest
import torch

from lora_one.types import LayerView
from tests.helpers.runs import run_config, start_of

M, N, R, S = 24, 16, 4, 16 / 4**0.5
G = torch.randn(M, N, generator=torch.Generator().manual_seed(0))
W = torch.randn(M, N, generator=torch.Generator().manual_seed(5))


def start(*overrides, gradient=G):
    layer = LayerView("layer", (M, N), lambda: W, R, S, torch.Generator().manual_seed(0))
    return start_of(run_config("init.direction=LoRA-GA", *overrides).init, layer, gradient)


def same_up_to_signs(ours, theirs):
    """Singular vectors are unique up to a common sign of U_i and V_i, here of vectors from different pairs."""
    torch.testing.assert_close(ours.abs(), theirs.abs(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("direction", "for_A", "for_B"),
    [
        ("ArB2r", [0, 1, 2, 3], [4, 5, 6, 7]),
        ("A2rBr", [4, 5, 6, 7], [0, 1, 2, 3]),
        ("ArBr", [1, 3, 5, 7], [0, 2, 4, 6]),
    ],
)
def test_factors_take_their_singular_vectors(direction, for_A, for_B):
    U, _, Vh = torch.linalg.svd(G)
    factors = start("init.scale=unit", f"init.ga_direction={direction}")
    same_up_to_signs(factors.A, Vh[for_A])
    same_up_to_signs(factors.B, U[:, for_B])
    assert factors.shift_base


def test_random_halves_are_disjoint():
    """A and B together use each of the 2 r leading pairs once."""
    U, _, Vh = torch.linalg.svd(G)
    factors = start("init.scale=unit", "init.ga_direction=random")
    used = ((Vh[: 2 * R] @ factors.A.T).abs() > 0.99).any(1).int() + ((U[:, : 2 * R].T @ factors.B).abs() > 0.99).any(
        1
    ).int()
    assert used.tolist() == [1] * (2 * R)


@pytest.mark.parametrize("gamma", [16, 64])
def test_stable_scales_both_factors_by_the_output_size(gamma):
    unit, stable = start("init.scale=unit"), start("init.scale=stable", f"init.stable_gamma={gamma}")
    for name in ("A", "B"):
        torch.testing.assert_close(getattr(stable, name), getattr(unit, name) * M**0.25 / gamma**0.5)


def test_published_gamma_is_16():
    torch.testing.assert_close(start().B, start("init.stable_gamma=16").B)


def test_other_scales():
    unit, gd, by_weight = start("init.scale=unit"), start("init.scale=gd"), start("init.scale=weightS")
    torch.testing.assert_close(gd.A, unit.A / S)
    torch.testing.assert_close(by_weight.A, unit.A * (torch.linalg.svdvals(W)[:R] / S).sqrt().mean())


@pytest.mark.parametrize("power", [0.01, 100.0])
def test_start_does_not_depend_on_the_gradient_s_size(power):
    """What sets the authors' code apart from PEFT's variant, whose B carries the singular values."""
    torch.testing.assert_close(start(gradient=G * power).B, start().B, rtol=1e-4, atol=1e-5)
