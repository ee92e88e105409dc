"""LoRA-One against Algorithm 1 written out with the exact SVD."""

import pytest
import torch

from lora_one.initialization.low_rank_step import StepSettings, factorised
from lora_one.initialization.methods.lora_one import descent_factors
from lora_one.types import LayerView
from tests.helpers.runs import run_config, start_of

M, N, R, S = 24, 16, 4, 16 / 4**0.5


def layer(weight=None, scaling=S):
    weight = torch.randn(M, N, generator=torch.Generator().manual_seed(5)) if weight is None else weight
    generator = torch.Generator().manual_seed(0)
    return LayerView("model.layer", (M, N), lambda: weight, R, scaling, generator)


def gradient(seed=0):
    return torch.randn(M, N, generator=torch.Generator().manual_seed(seed))


def settings(*overrides):
    return run_config(*overrides).init


def start(G, *overrides):
    return start_of(settings(*overrides), layer(), G)


def exact(G):
    U, singular, Vh = (part.float() for part in torch.linalg.svd(-G.double(), full_matrices=False))
    return U[:, :R], singular[:R], Vh[:R], singular[0]


def test_product_is_the_best_rank_r_descent_step():
    """Eckart-Young: B A = [-G]_r / (gamma sigma_1), with the published gamma of 128."""
    G = gradient()
    factors = start(G)
    U, singular, Vh, largest = exact(G)
    torch.testing.assert_close(factors.B @ factors.A, U * singular @ Vh / (128 * largest))
    # nothing of rank r is nearer to -G: the error is exactly the tail of the spectrum
    error = (factors.B @ factors.A * 128 * largest + G).norm()
    torch.testing.assert_close(error, torch.linalg.svdvals(G)[R:].norm())


def test_step_has_the_paper_s_spectral_norm():
    """||s B A||_2 = (alpha / sqrt(r)) / gamma: 0.0442 at alpha 16, r 8, gamma 128 (here r 4: 0.0625)."""
    factors = start(gradient())
    assert float(torch.linalg.matrix_norm(S * factors.B @ factors.A, 2)) == pytest.approx(8 / 128, rel=1e-4)


def test_factors_are_balanced_and_point_downhill():
    G = gradient()
    factors = start(G)
    torch.testing.assert_close(factors.B.T @ factors.B, factors.A @ factors.A.T)
    assert (factors.B @ factors.A * G).sum() < 0
    assert not factors.shift_base


@pytest.mark.parametrize("power", [1e-6, 1e5])
def test_start_does_not_depend_on_the_loss_s_scale(power):
    one, other = start(gradient()), start(gradient() * power)
    torch.testing.assert_close(one.B, other.B)
    torch.testing.assert_close(one.A, other.A)


def test_without_normalisation_it_is_one_gradient_step():
    """normalize=none: s B A = -(s / gamma) [G]_r, one step of learning rate s / gamma on the rank-r gradient."""
    G = gradient()
    factors = start(G, "init.normalize=none", "init.stable_gamma=2")
    U, singular, Vh, _ = exact(G)
    torch.testing.assert_close(S * factors.B @ factors.A, S / 2 * (U * singular @ Vh))


@pytest.mark.parametrize("gamma", [1.0, 16.0, 128.0])
def test_gamma_divides_the_product(gamma):
    unit = start(gradient(), "init.scale=unit")
    stable = start(gradient(), f"init.stable_gamma={gamma}")
    torch.testing.assert_close(stable.B @ stable.A, unit.B @ unit.A / gamma)


def test_scale_modes():
    G = gradient()
    unit, gd, by_weight = (start(G, f"init.scale={scale}") for scale in ("unit", "gd", "weightS"))
    torch.testing.assert_close(gd.B @ gd.A, unit.B @ unit.A / S**2)
    sigma = torch.linalg.svdvals(layer().weight())[:R]
    torch.testing.assert_close(by_weight.B, unit.B * (sigma / S).sqrt().mean())


def test_energy_is_the_share_of_the_gradient_captured():
    values = torch.linalg.svdvals(gradient()).square()
    energy = factorised("layer", gradient(), StepSettings(singular=R)).energy
    assert energy == pytest.approx(float(values[:R].sum() / values.sum()), rel=1e-5)


def test_factors_are_fp32_whatever_the_gradient_is():
    factors = start(gradient().bfloat16())
    assert factors.B.dtype == factors.A.dtype == torch.float32


def test_zero_gradient_is_refused_by_name():
    with pytest.raises(ValueError, match=r"layer model\.layer is zero"):
        start(torch.zeros(M, N))


def test_gradient_that_is_not_finite_is_an_error():
    G = gradient()
    G[2, 3] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        start(G)


def test_directions_that_the_gradient_lacks_train_from_a_zero_column():
    """G of rank 2, r = 4: B A = [-G]_2, and the other two columns of B get a gradient, since A's rows are not zero."""
    generator = torch.Generator().manual_seed(0)
    G = torch.randn(16, 2, generator=generator) @ torch.randn(2, 10, generator=generator)
    B, A = descent_factors(factorised("layer", G, StepSettings(singular=4)), normalize="s0")
    torch.testing.assert_close(B @ A, -G / torch.linalg.svdvals(G)[0], rtol=1e-4, atol=1e-6)
    assert not B[:, 2:].any()
    torch.testing.assert_close(A[2:].norm(dim=1), A[0].norm().expand(2))
    torch.testing.assert_close(A @ A.T, torch.diag(A.square().sum(dim=1)), rtol=1e-4, atol=1e-5)
