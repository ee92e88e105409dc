"""Low-rank approximation: seeded, deterministic, to a tolerance."""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

EXACT_BELOW = 256  # min(m, n) up to which the exact SVD costs no more than a randomised one
OVERSAMPLING = 24
MAX_ITERATIONS = 30
ROUNDING = 1e-6  # of an energy in fp32: a smaller gain is none
SLOWEST = 0.8  # assumed least ratio of a gain to the one before: the last gains are always of slow directions


@dataclass(frozen=True)
class LowRank:
    """[M]_r = U diag(S) Vh with U (m, r), S (r,) descending, Vh (r, n), fp32, on the device of M.

    ``energy`` is ||[M]_r||_F^2 / ||M||_F^2, the share of M that rank r captures.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    energy: float


def truncated_svd(matrix: Tensor, rank: int, *, tolerance: float, generator: Generator) -> LowRank:
    """Best rank-r approximation of a matrix (Eckart-Young), exact where it is small, else by subspace iteration.

    The iteration (Halko, Martinsson, Tropp, arXiv:0909.4061, Alg. 4.4) goes on until the energy still to be
    gained, extrapolated from the last two gains, is below ``tolerance`` x the energy captured.
    Signs: the entry of largest magnitude in each column of U is positive.

    matrix: (m, n), any float dtype, decomposed in at least fp32.  generator: CPU random numbers of the sketch.
    Raises ValueError: rank outside [1, min(m, n)], or an entry that is not finite.
    """
    if not 1 <= rank <= min(matrix.shape):
        raise ValueError(f"rank must lie in [1, {min(matrix.shape)}] for shape {tuple(matrix.shape)}, got {rank}")
    matrix = matrix if matrix.dtype == torch.float64 else matrix.float()
    total = matrix.square().sum()
    if not torch.isfinite(total):
        raise ValueError(f"matrix of shape {tuple(matrix.shape)} holds entries that are not finite")
    if min(matrix.shape) <= max(EXACT_BELOW, rank + OVERSAMPLING):
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        U, S, Vh = _subspace_iteration(matrix, rank, tolerance, generator)
    S = S[:rank]
    energy = float(S.square().sum() / total) if total > 0 else 0.0
    return fix_signs(LowRank(U[:, :rank], S, Vh[:rank], energy))


def fix_signs(step: LowRank) -> LowRank:
    """An SVD leaves the sign of each pair of vectors open: make each column of U positive where it is largest."""
    signs = torch.gather(step.U, 0, step.U.abs().argmax(dim=0, keepdim=True)).sign().squeeze(0)
    return LowRank(step.U * signs, step.S, step.Vh * signs[:, None], step.energy)


def _subspace_iteration(
    matrix: Tensor, rank: int, tolerance: float, generator: Generator
) -> tuple[Tensor, Tensor, Tensor]:
    columns = min(rank + OVERSAMPLING, min(matrix.shape))
    sketch = torch.randn(matrix.shape[1], columns, generator=generator)
    Q = torch.linalg.qr(matrix @ sketch.to(matrix)).Q  # (m, columns)
    energies: list[float] = []
    for _ in range(MAX_ITERATIONS):
        right = torch.linalg.qr(matrix.T @ Q)  # M^T Q = P R, so Q^T M = R^T P^T and its values are those of R
        energies.append(float(torch.linalg.svdvals(right.R)[:rank].square().sum()))
        if nothing_to_gain(energies, tolerance):
            break
        Q = torch.linalg.qr(matrix @ right.Q).Q
    U, S, Vh = torch.linalg.svd(right.R.T, full_matrices=False)  # (columns, columns)
    return Q @ U, S, Vh @ right.Q.T


def nothing_to_gain(energies: list[float], tolerance: float) -> bool:
    """Whether the captured energies of subspace iteration have settled.

    Gains shrink geometrically, so two of them tell what all further ones add up to. The first ones come from the
    directions that settle fast and would promise too much where a flat spectrum (noise, signs) is behind them.
    """
    if len(energies) < 3:
        return len(energies) == 2 and energies[1] <= energies[0]
    last, gain = energies[-2] - energies[-3], energies[-1] - energies[-2]
    if last <= 0 or gain <= ROUNDING * energies[-1]:
        return True
    shrink = max(gain / last, SLOWEST)
    return shrink < 1 and gain * shrink / (1 - shrink) <= tolerance * energies[-1]
