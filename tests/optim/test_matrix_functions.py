"""Matrix sign, inverse roots and orthonormal bases, against the singular value decomposition."""

import math

import pytest
import torch

from lora_one.optim.matrix_functions import (
    best_quintic,
    eigen,
    inverse_root,
    matrix_sign,
    orthonormal_basis,
    polar_express,
    power_of_two,
    pseudo_power,
)


def with_spectrum(spectrum, m=64, batch=3):
    """Random U diag(spectrum) V^T and U V^T: (batch, m, r), fp64."""
    generator = torch.Generator().manual_seed(0)
    r = len(spectrum)
    U, V = (
        torch.linalg.qr(torch.randn(batch, rows, r, generator=generator, dtype=torch.float64))[0] for rows in (m, r)
    )
    return U * torch.as_tensor(spectrum, dtype=torch.float64) @ V.mT, U @ V.mT


@pytest.mark.parametrize(
    ("dtype", "smallest", "tolerance"),
    [
        (torch.float32, 1e-1, 2e-5),
        (torch.float32, 1e-2, 1e-4),
        (torch.float32, 3e-3, 1e-3),
        (torch.float64, 3e-3, 1e-12),
    ],
)
@pytest.mark.parametrize("size", [1e-16, 1.0, 1e6, 1e30])
def test_matrix_sign_is_u_v_transposed(dtype, smallest, tolerance, size):
    """Singular values between 1 and ``smallest``, which is at least 1e-3 of the Frobenius norm."""
    X, expected = with_spectrum(torch.logspace(0, math.log10(smallest), 6))
    found = matrix_sign((size * X).to(dtype), 8).double()
    assert torch.linalg.matrix_norm(found - expected, 2).max() < tolerance


def test_power_of_two_changes_no_digit():
    """At most twice as small as the size, exact, and 1 for small sizes, infinite only for infinite ones."""
    sizes = torch.tensor([0.0, 1e-30, 0.99, 1.0, 1.5, 2.0, 3.0, 1e18, 3e38])
    found = power_of_two(sizes)
    assert found[:5].tolist() == [1.0] * 5 and found[5:7].tolist() == [2.0, 2.0]
    assert (torch.frexp(found).mantissa == 0.5).all() and (found[5:] <= 1.0001 * sizes[5:]).all()
    assert power_of_two(torch.tensor(float("inf"))).isinf()


def test_matrix_sign_of_zero_is_zero_and_of_low_rank_has_no_more_rank():
    X, _ = with_spectrum([1.0, 0.5, 0.0, 0.0])
    U, _, Vh = torch.linalg.svd(X, full_matrices=False)
    found = matrix_sign(torch.cat([X, torch.zeros_like(X)]), 8)
    torch.testing.assert_close(found[:3], U[..., :2] @ Vh[:, :2], rtol=1e-8, atol=1e-8)
    assert (found[3:] == 0).all()


@pytest.mark.parametrize("size", [1e-19, 1e-25, 1e-35])
def test_matrix_sign_of_a_vanishing_matrix_is_finite(size):
    """The square of its norm is zero in fp32: a moment that decays without gradients."""
    X, _ = with_spectrum([1.0, 0.5, 0.2])
    assert torch.linalg.matrix_norm(matrix_sign((size * X).float(), 8), 2).max() < 1.001


def test_fewer_steps_of_the_matrix_sign_are_less_exact():
    X, expected = with_spectrum(torch.logspace(0, -2, 6))
    errors = [torch.linalg.matrix_norm(matrix_sign(X, steps) - expected, 2).max() for steps in (3, 5, 8)]
    assert errors[0] > 5 * errors[1] > 1000 * errors[2]


@pytest.mark.parametrize(("low", "high"), [(1e-3, 1.0), (0.05, 1.95), (0.7, 1.3)])
def test_no_other_odd_quintic_is_closer_to_one(low, high):
    """Chebyshev: the error reaches its maximum four times, with alternating signs."""
    a, b, c = best_quintic(low, high)
    x = torch.linspace(low, high, 200_001, dtype=torch.float64)
    error = a * x + b * x**3 + c * x**5 - 1
    largest = error.abs().max()
    signs = torch.sign(error[error.abs() > largest * (1 - 1e-6)])
    assert (signs[1:] != signs[:-1]).sum() == 3


def test_polynomials_end_at_one():
    x = torch.logspace(-3, 0, 1001, dtype=torch.float64)
    for a, b, c in polar_express(8, 1e-3):
        x = a * x + b * x**3 + c * x**5
    torch.testing.assert_close(x, torch.ones_like(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverse_root_is_a_root_of_the_damped_inverse(dtype):
    F, _ = with_spectrum([3.0, 1.0, 0.1])
    K = (F.mT @ F).to(dtype)
    root = inverse_root(K, 1e-3).double()
    damped = K.double() + 1e-3 * K.double().norm(dim=(-2, -1), keepdim=True) * torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(root.mT @ root, torch.linalg.inv(damped), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [0.0, 1e-12, 1.0, 1e6])
def test_inverse_root_of_a_singular_matrix_is_finite_with_the_least_damping(size):
    F, _ = with_spectrum([1.0, *[0.0] * 63], m=80)
    K = (size * F.mT @ F).float()
    assert inverse_root(K, 1e-6).isfinite().all()


def test_pseudo_inverse_is_torchs():
    F, _ = with_spectrum([3.0, 1.0, 0.1, 0.0])
    K = F.mT @ F
    torch.testing.assert_close(pseudo_power(*eigen(F), -1), torch.linalg.pinv(K, hermitian=True), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("smallest", [1e-3, 1e-4, 1e-5])
def test_directions_above_the_rounding_of_the_factor_are_kept(smallest):
    """A Gram matrix in the factor's own precision would lose those below the square root of its rounding errors."""
    F, _ = with_spectrum([1.0, 0.5, smallest])
    U, inverse = orthonormal_basis(F.float())
    torch.testing.assert_close(U.mT @ U, torch.eye(3).expand(3, 3, 3), rtol=0, atol=1e-5)
    largest = torch.linalg.svdvals(inverse)[:, 0]
    torch.testing.assert_close(largest, torch.full_like(largest, 1 / smallest), rtol=0.1, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("smallest", [1.0, 1e-1, 1e-2])
def test_basis_spans_the_columns_and_is_orthonormal(dtype, smallest):
    F, _ = with_spectrum([3.0, 2.0, smallest])
    U, inverse = orthonormal_basis(F.to(dtype))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(U.mT @ U, torch.eye(3, dtype=dtype).expand(3, 3, 3), rtol=0, atol=30 * eps)
    left, S, right = torch.linalg.svd(F, full_matrices=False)
    exact = right.mT / S[..., None, :] @ right  # the inverse of the polar factor T
    torch.testing.assert_close(inverse.double(), exact, rtol=0, atol=float(1e4 * eps / smallest))
    torch.testing.assert_close(U.double(), left @ right, rtol=0, atol=float(1e4 * eps))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_directions_without_rank_are_zero_in_the_basis_and_the_inverse(dtype):
    """Of rank 2 of 4, and zero: the Moore-Penrose inverse, whose size does not depend on rounding."""
    F, _ = with_spectrum([3.0, 1.0, 0.0, 0.0])
    F = F.to(dtype)
    U, inverse = orthonormal_basis(torch.cat([F, torch.zeros_like(F)]))
    assert (U[3:] == 0).all() and (inverse[3:] == 0).all()
    left, S, right = (part.double() for part in torch.linalg.svd(F, full_matrices=False))
    tolerance = 1e3 * torch.finfo(dtype).eps
    torch.testing.assert_close(U[:3].double(), left[..., :2] @ right[:, :2], rtol=0, atol=tolerance)
    exact = right[:, :2].mT / S[:, None, :2] @ right[:, :2]
    torch.testing.assert_close(inverse[:3].double(), exact, rtol=0, atol=tolerance)
