"""Low-rank approximation: seeded, deterministic, to a tolerance."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

EXACT_BELOW = 256  # min(m, n) up to which the exact SVD costs no more than a randomised one
OVERSAMPLING = 8
MAX_BLOCKS = 30
ROUNDING = 1e-6  # relative error of an energy in fp32, with room
SLOWEST = 0.6  # assumed least ratio of a gain to the one before: the last gains are always of slow directions
SQUARES_FIT = (1e-12, 1e12)  # norms of a matrix that need no rescaling before its entries are squared in fp32


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
    """Best rank-r approximation of a matrix (Eckart-Young), exact where it is small, else from a block Krylov space.

    The space grows until the energy still to be gained, extrapolated from the last two gains, is below
    ``tolerance`` x the energy captured.  Signs: the entry of largest magnitude in each column of U is positive.

    matrix: (m, n), any float dtype, decomposed in at least fp32.  generator: CPU random numbers of the sketch.
    Raises ValueError: rank outside [1, min(m, n)], or an entry that is not finite.
    """
    if not 1 <= rank <= min(matrix.shape):
        raise ValueError(f"rank must lie in [1, {min(matrix.shape)}] for shape {tuple(matrix.shape)}, got {rank}")
    matrix = matrix if matrix.dtype == torch.float64 else matrix.float()
    norm = float(torch.linalg.vector_norm(torch.linalg.vector_norm(matrix, dim=1)))
    if not SQUARES_FIT[0] < norm < SQUARES_FIT[1]:
        largest = float(matrix.abs().max())
        if not math.isfinite(largest):
            raise ValueError(f"matrix of shape {tuple(matrix.shape)} holds entries that are not finite")
        if largest > 0:
            step = truncated_svd(matrix / largest, rank, tolerance=tolerance, generator=generator)
            return replace(step, S=step.S * largest)
    if min(matrix.shape) <= max(EXACT_BELOW, rank + OVERSAMPLING):
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        U, S, Vh = _by_krylov(matrix, rank, tolerance, generator)
    S = S[:rank]
    energy = float(S.square().sum()) / norm**2 if norm > 0 else 0.0
    return fix_signs(LowRank(U[:, :rank], S, Vh[:rank], min(1.0, energy)))


def fix_signs(step: LowRank) -> LowRank:
    """An SVD leaves the sign of each pair of vectors open: make each column of U positive where it is largest."""
    signs = torch.gather(step.U, 0, step.U.abs().argmax(dim=0, keepdim=True)).sign().squeeze(0)
    return LowRank(step.U * signs, step.S, step.Vh * signs[:, None], step.energy)


def _by_krylov(matrix: Tensor, rank: int, tolerance: float, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    space = KrylovSpace(tuple(matrix.shape), rank, tolerance)
    right = space.start(generator).to(matrix)
    for _ in range(MAX_BLOCKS):
        left = space.add_left(matrix @ right)
        space.add_right((left.T @ matrix).T)  # read along M's rows: faster than M^T Q
        if space.settled:
            break
        right = space.next_right()
    return space.svd()


class KrylovSpace:
    """Leading singular vectors of an M that is known by its products alone; every earlier block is kept.

    Blocks: Q_1 spans M Omega, Q_(j+1) spans what M M^T Q_j adds to Q_1 ... Q_j.  With Q all of them, the best rank-r
    approximation in their span is [Q Q^T M]_r, and Q^T M is at hand (Musco and Musco, arXiv:1504.05477, Alg. 2).
    One block asks for two products: ``add_left(M V)`` gives Q_j, ``add_right(M^T Q_j)`` takes it in.
    """

    def __init__(self, shape: tuple[int, int], rank: int, tolerance: float) -> None:
        self.shape, self.rank, self.tolerance = shape, rank, tolerance
        self.left: list[Tensor] = []  # Q_j, (m, columns)
        self.right: list[Tensor] = []  # M^T Q_j, (n, columns)
        self.energies: list[float] = []

    def start(self, generator: Generator) -> Tensor:
        """Omega (n, columns), on the CPU."""
        return torch.randn(self.shape[1], min(self.rank + OVERSAMPLING, *self.shape), generator=generator)

    def add_left(self, product: Tensor) -> Tensor:
        """Orthonormal Q_j from M V; twice, for what the first round leaves may be all rounding."""
        for _ in range(2 if self.left else 1):
            for Q in self.left:
                product = product - Q @ (Q.T @ product)
            product = torch.linalg.qr(product).Q
        self.left.append(product[:, : min(self.shape) - sum(Q.shape[1] for Q in self.left)])
        return self.left[-1]

    def add_right(self, product: Tensor) -> None:
        self.right.append(product)
        known = torch.cat(self.right, dim=1)  # (n, all columns): its Gram matrix has the squares of Q^T M's values
        self.energies.append(float(torch.linalg.eigvalsh(known.T @ known)[-self.rank :].sum()))

    def next_right(self) -> Tensor:
        return torch.linalg.qr(self.right[-1]).Q

    @property
    def settled(self) -> bool:
        full = sum(Q.shape[1] for Q in self.left) == min(self.shape)
        return full or nothing_to_gain(self.energies, self.tolerance)

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U (m, r), S (r,), Vh (r, n) of Q Q^T M."""
        right = torch.linalg.qr(torch.cat(self.right, dim=1))  # M^T Q = P R, so Q^T M = R^T P^T
        U, S, Vh = torch.linalg.svd(right.R.T, full_matrices=False)
        kept = slice(0, self.rank)
        return torch.cat(self.left, dim=1) @ U[:, kept], S[kept], Vh[kept] @ right.Q.T


def nothing_to_gain(energies: list[float], tolerance: float) -> bool:
    """Whether the captured energies of a growing space have settled.

    Gains shrink at least geometrically, so two of them bound what all further ones add up to. The first ones come
    from directions that settle fast and would promise too much where a flat spectrum (noise, signs) is behind them.
    """
    if len(energies) < 2:
        return False
    gain = energies[-1] - energies[-2]
    if gain <= ROUNDING * energies[-1]:
        return True
    if len(energies) < 3:
        return False
    shrink = max(gain / (energies[-2] - energies[-3]), SLOWEST)
    return shrink < 1 and gain * shrink / (1 - shrink) <= tolerance * energies[-1]
