"""Functions of batches of matrices: matrix sign, inverse roots, pseudo-inverses. Most of the work is r x r."""

from functools import cache
from math import sqrt

import torch
from torch import Tensor

from lora_one.linalg import exact_dtype

SMALLEST = 1e-30  # instead of 0 in a divisor whose dividend is 0, too
SMALLEST_NORM = 1e-18  # its square is still a number in fp32; a smaller X fades to msign(0) = 0
LOWEST_SIGN = 1e-3  # singular values from this share of the Frobenius norm on become 1 in `matrix_sign`
STEPS_PER_GRAM = 4  # of `matrix_sign`, before the Gram matrix is computed again


def matrix_sign(X: Tensor, steps: int) -> Tensor:
    """Return msign(X) = U V^T of X = U S V^T, for tall X (k, m, r), by the Polar Express polynomials; msign(0) = 0.

    Source: arXiv:2505.16932. Each step is X <- X p(X^T X), so several steps are X <- X Q with an r x r matrix Q that
    depends on H = X^T X alone. Here Q is accumulated and H is recomputed after four steps, where rounding would
    otherwise grow: two passes over X instead of eight. No step waits for the device.

    With 8 steps in fp32, singular values of at least 1e-3 of the Frobenius norm are within 1e-3 of 1; smaller ones stay
    below 1.
    """
    X = X / power_of_two(X.abs().amax((-2, -1), keepdim=True))  # so that no square overflows
    X = X / torch.linalg.matrix_norm(X, keepdim=True).clamp_min(SMALLEST_NORM)
    identity = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    polynomials = polar_express(steps, LOWEST_SIGN)
    for first in range(0, steps, STEPS_PER_GRAM):
        H, Q = X.mT @ X, identity
        for a, b, c in polynomials[first : first + STEPS_PER_GRAM]:
            P = a * identity + b * H + c * (H @ H)
            H, Q = P @ H @ P, Q @ P
        X = X @ Q
    return X


def power_of_two(size: Tensor) -> Tensor:
    """Return the power of two below each size; 1 for sizes below 1. Division by it only changes exponents."""
    return size.clamp_min(1.0).log2().floor().exp2()


@cache
def polar_express(steps: int, lowest: float) -> list[tuple[float, float, float]]:
    """Return (a, b, c) of each step's a x + b x^3 + c x^5, for singular values in [lowest, 1].

    Each is the best approximation of 1 on the interval that the step before maps to (arXiv:2505.16932, Theorem 3.1).
    """
    low, high, found = lowest, 1.0, []
    for _ in range(steps):
        a, b, c = best_quintic(low, high)
        found.append((a, b, c))
        low = a * low + b * low**3 + c * low**5
        high = 2 - low
    return found


def best_quintic(low: float, high: float) -> tuple[float, float, float]:
    """Return the odd polynomial a x + b x^3 + c x^5 with the smallest maximum of |1 - p(x)| on [low, high].

    Remez's algorithm, from the Chebyshev extrema of [low, high]: the error has one size and alternating signs at both
    ends and at the two extrema between.
    """
    if high - low < 1e-5 * high:  # both ends are 1 for the polynomial of Newton and Schulz, up to rounding
        return 15 / 8 / high, -10 / 8 / high**3, 3 / 8 / high**5
    ones, inner, size = torch.ones(4, dtype=torch.float64), ((3 * low + high) / 4, (low + 3 * high) / 4), None
    while True:
        rows = [[x, x**3, x**5, sign] for x, sign in zip((low, *inner, high), (1, -1, 1, -1), strict=True)]
        a, b, c, error = torch.linalg.solve(torch.tensor(rows, dtype=torch.float64), ones).tolist()
        if size is not None and abs(error - size) < 1e-14:
            return a, b, c
        size, root = error, sqrt(9 * b * b - 20 * a * c)  # p'(x) = a + 3 b x^2 + 5 c x^4 = 0
        inner = (sqrt((-3 * b - root) / (10 * c)), sqrt((-3 * b + root) / (10 * c)))


def inverse_root(K: Tensor, damping: float) -> Tensor:
    """Return L^-1 of the Cholesky decomposition K + damping ||K||_F I = L L^T: (k, r, r), lower triangular.

    L^-T L^-1 is the damped inverse of K. The damping is relative, so zero and tiny K need no special case; from 1e-6
    on, fp32 never fails. A K that is not finite gives NaN. Nothing waits for the device.
    """
    size = torch.linalg.matrix_norm(K, keepdim=True)
    identity = torch.eye(K.shape[-1], dtype=K.dtype, device=K.device)
    L, _ = torch.linalg.cholesky_ex(K + (damping * size + SMALLEST) * identity)
    return torch.linalg.solve_triangular(L, identity.expand_as(L), upper=False)


def eigen(F: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues (k, r) and eigenvectors (k, r, r) of F^T F for tall F (k, m, r), in fp64.

    Eigenvalues of directions in which F is zero up to its own rounding, that is, whose singular value is at most r eps
    times the largest, become 0. In the precision of F the limit would be sqrt(r eps), because F^T F squares the ratio.
    One batched call, in which the host waits for the device once.
    """
    r, exact = F.shape[-1], wide(F)
    values, vectors = torch.linalg.eigh(exact.mT @ exact)
    share = max(r * torch.finfo(exact.dtype).eps, (r * torch.finfo(F.dtype).eps) ** 2)
    return values.masked_fill(values <= share * values[..., -1:], 0.0), vectors  # NaN stays NaN


def wide(F: Tensor) -> Tensor:
    """Return F in fp64; in fp32 on a device without it."""
    return F.to(exact_dtype(F.device))


def pseudo_power(values: Tensor, vectors: Tensor, power: float) -> Tensor:
    """Return V diag(w)^power V^T (k, r, r) with 0 in the place of 0^power: power = -1 is the pseudo-inverse."""
    powers = (values.clamp_min(SMALLEST) ** power).masked_fill(values == 0, 0.0)
    return (vectors * powers[..., None, :]) @ vectors.mT


def orthonormal_basis(F: Tensor) -> tuple[Tensor, Tensor]:
    """Return U = F T^+ and T^+ (k, r, r) for tall F = U T (k, m, r), where T is symmetric: the polar decomposition.

    T^+ is the pseudo-inverse of T = (F^T F)^1/2: directions in which F is zero, up to rounding (see `eigen`), are zero
    in U and T^+, so a zero F gives zeros. The Gram matrix loses half of the digits; a second round makes U orthonormal.
    """
    first = pseudo_power(*eigen(F), -0.5)
    U = wide(F) @ first
    second = pseudo_power(*eigen(U), -0.5)
    return (U @ second).to(F), (first @ second).to(F)
