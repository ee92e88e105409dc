"""The low-rank step against the exact SVD."""

import pytest
import torch

from lora_one.linalg import nothing_to_gain, truncated_svd


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def with_spectrum(m, n, power, seed=0, dtype=torch.float32):
    """(m, n) with singular values k^-power."""
    k = min(m, n)
    U = torch.linalg.qr(torch.randn(m, k, generator=generator(seed), dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(n, k, generator=generator(seed + 1), dtype=torch.float64)).Q
    S = torch.arange(1, k + 1, dtype=torch.float64) ** -power
    return (U * S @ V.T).to(dtype)


def svd(matrix, rank, tolerance=1e-3, seed=0):
    return truncated_svd(matrix, rank, tolerance=tolerance, generator=generator(seed))


@pytest.mark.parametrize("shape", [(16, 10), (10, 16), (300, 700), (700, 300)])
def test_is_the_best_approximation(shape):
    M = with_spectrum(*shape, power=1.0)
    step = svd(M, 4, tolerance=1e-12)
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    best = U[:, :4] * S[:4] @ Vh[:4]
    assert (step.U * step.S @ step.Vh - best).norm() < 1e-3 * best.norm()
    torch.testing.assert_close(step.S, S[:4], rtol=1e-4, atol=1e-6)
    assert step.energy == pytest.approx(float(S[:4].square().sum() / S.square().sum()), rel=1e-4)


@pytest.mark.parametrize("power", [0.3, 0.5, 1.0])
def test_loses_no_more_energy_than_the_tolerance(power):
    M = with_spectrum(400, 600, power)
    best = torch.linalg.svdvals(M)[:8].square().sum()
    assert svd(M, 8).S.square().sum() >= (1 - 1e-3) * best
    captured = (svd(M, 8).U.T @ M).square().sum()
    assert captured >= (1 - 1e-3) * best


@pytest.mark.parametrize("rank", [8, 16, 32])
def test_loses_no_more_where_the_spectrum_ends_in_noise(rank):
    """Some strong directions that settle at once, then a bulk that hardly decays, as gradients and their signs have."""
    M = torch.randn(400, 300, generator=generator(1))
    strong = torch.randn(400, 20, generator=generator(2)) * torch.logspace(0, -3, 20)
    M += strong @ torch.randn(20, 300, generator=generator(3))
    for matrix in (M, M.sign()):
        best = torch.linalg.svdvals(matrix)[:rank].square().sum()
        assert svd(matrix, rank).S.square().sum() >= (1 - 1e-3) * best


@pytest.mark.parametrize("shape", [(1024, 1024), (1024, 2816)])
@pytest.mark.parametrize("power", [0.3, 0.5])
def test_slow_decay_at_the_size_of_a_model(shape, power):
    """On a diagonal, which a Gaussian sketch cannot tell from any other singular vectors."""
    S = torch.arange(1, 1025) ** -power
    M = torch.zeros(shape)
    M.diagonal().copy_(S)
    step, best = svd(M, 8), S[:8].square().sum()
    assert (step.U.T @ M).square().sum() >= (1 - 1e-3) * best
    assert (M @ step.Vh.T).square().sum() >= (1 - 1e-3) * best


def test_no_decay_at_all():
    M = torch.randn(600, 500, generator=generator())
    best = torch.linalg.svdvals(M)[:8].square().sum()
    assert (svd(M, 8).U.T @ M).square().sum() >= (1 - 2e-3) * best


@pytest.mark.parametrize("shape", [(40, 30), (400, 300)])
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e20])
def test_rank_below_the_one_asked_for(shape, scale):
    left, right = torch.randn(shape[0], 3, generator=generator(1)), torch.randn(3, shape[1], generator=generator(2))
    M = left @ right * scale
    step = svd(M, 8)
    torch.testing.assert_close(step.U * (step.S / scale) @ step.Vh, M / scale, rtol=0, atol=1e-4)
    assert step.energy == pytest.approx(1.0, abs=1e-4)
    assert (step.S[3:] <= 1e-5 * step.S[0]).all()
    torch.testing.assert_close(step.U.T @ step.U, torch.eye(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(step.Vh @ step.Vh.T, torch.eye(8), atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_scale_of_the_matrix_does_not_matter(scale):
    M = with_spectrum(400, 300, power=0.5)
    one, scaled = svd(M, 8, 1e-6), svd(M * scale, 8, 1e-6)
    torch.testing.assert_close(scaled.S / scale, one.S, rtol=1e-4, atol=0)
    assert scaled.energy == pytest.approx(one.energy, rel=1e-4)


def test_very_ill_conditioned():
    """Singular values from 1 to 1e-12: the leading ones to fp32 precision, every factor orthonormal."""
    S = torch.logspace(0, -12, 300, base=10)
    M = torch.linalg.qr(torch.randn(400, 300, generator=generator(1))).Q * S
    step = svd(M, 8, 1e-9)
    torch.testing.assert_close(step.S, S[:8], rtol=1e-4, atol=0)
    torch.testing.assert_close(step.U.T @ step.U, torch.eye(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(step.Vh @ step.Vh.T, torch.eye(8), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(16, 10), (400, 300)])
def test_factors_are_orthonormal_and_deterministic_with_fixed_signs(shape):
    M = with_spectrum(*shape, power=0.5)
    one, two = svd(M, 5), svd(M, 5)
    torch.testing.assert_close(one.U.T @ one.U, torch.eye(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(one.Vh @ one.Vh.T, torch.eye(5), atol=1e-5, rtol=0)
    assert torch.equal(one.U, two.U) and torch.equal(one.Vh, two.Vh)
    largest = one.U.gather(0, one.U.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


def test_signs_do_not_depend_on_the_sketch():
    M = with_spectrum(400, 300, power=1.0)
    torch.testing.assert_close(svd(M, 3, 1e-8, seed=0).U, svd(M, 3, 1e-8, seed=7).U, atol=1e-3, rtol=0)


def test_half_precision_is_decomposed_in_fp32():
    M = with_spectrum(20, 12, power=1.0, dtype=torch.bfloat16)
    step = svd(M, 3)
    assert step.U.dtype == step.S.dtype == step.Vh.dtype == torch.float32
    torch.testing.assert_close(step.S, torch.linalg.svdvals(M.float())[:3])


def test_zero_matrix_captures_nothing():
    assert svd(torch.zeros(5, 4), 2).energy == 0.0


@pytest.mark.parametrize("rank", [0, 5])
def test_rank_out_of_range(rank):
    with pytest.raises(ValueError, match=rf"\[1, 4\].*got {rank}"):
        svd(torch.randn(4, 6), rank)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite(bad):
    M = torch.ones(4, 6)
    M[1, 2] = bad
    with pytest.raises(ValueError, match="not finite"):
        svd(M, 2)


@pytest.mark.parametrize(
    ("energies", "settled"),
    [
        ([1.0], False),
        ([1.0, 1.1], False),
        ([1.0, 1.0], True),
        ([1.0, 1.1, 1.2], False),
        ([1.0, 1.1, 1.1001], True),
        ([1.0, 1.0, 1.0 + 1e-7], True),  # settled, then rounding: no division by the gain of zero before
        ([1.0, 1.0 + 1e-7, 1.0 + 3e-7], True),
        ([1.0, 0.9999999, 1.0], True),
    ],
)
def test_iteration_ends_when_nothing_is_to_be_gained(energies, settled):
    assert nothing_to_gain(energies, 1e-3) is settled
