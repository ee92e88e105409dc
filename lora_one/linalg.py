"""Low-rank approximation of a matrix: seeded, deterministic, accurate in each of the r directions; full precision."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor
from torch.nn.functional import pad

EXACT_BELOW = 256  # min(m, n) up to which the exact SVD costs no more than a randomised one
OVERSAMPLING = 8
MAX_BLOCKS = 30
PRODUCT_ERROR = 1e-5  # target of the relative Frobenius error of [M]_r ...
PRODUCT_BLOCKS = 8  # ... and the number of blocks after which it is no longer required, as for a flat spectrum
FASTEST = 0.5  # lower bound on the assumed ratio of an error to the one half a block earlier
NOISE = 5e-7  # S_i / S_1 at or below which direction i is a rounding error: about 4 x the precision of fp32
LOST = 1e-3  # overlap with the known directions above which a new direction is only rounding error
SQUARES_FIT = (1e-12, 1e12)  # range of norms for which the squares of a matrix's entries neither over- nor underflow


@dataclass(frozen=True)
class LowRank:
    """[M]_r = U diag(S) Vh with U (m, r), S (r,) descending, Vh (r, n), fp32, on the device of M.

    ``energy`` is ||[M]_r||_F^2 / ||M||_F^2, the share of M that rank r captures.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    energy: float


def exact_dtype(device: torch.device) -> torch.dtype:
    """Return fp64, or fp32 on a device without it."""
    return torch.float32 if device.type == "mps" else torch.float64


@contextmanager
def full_precision(device: torch.device | None = None) -> Iterator[None]:
    """Return a context in which fp32 matrices are multiplied in fp32: no autocast and no TF32, whatever the caller set.

    device: whose autocast is switched off; None: that of the CPU and of the accelerator.  Within the context torch
    refuses to read its older settings (allow_tf32), if the caller has set one.
    """
    if device is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        kinds = ["cpu", *([accelerator.type] if accelerator else [])]
    else:
        kinds = [device.type]
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    with ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        for backend, precision in zip(backends, before, strict=True):
            stack.callback(setattr, backend, "fp32_precision", precision)
            backend.fp32_precision = "ieee"
        yield


@full_precision()
def truncated_svd(matrix: Tensor, rank: int, *, tolerance: float, generator: Generator) -> LowRank:
    """Return the best rank-r approximation of a matrix (Eckart-Young).

    Small matrices are decomposed exactly, larger ones in a block Krylov space. Then each direction is accurate
    independently of S_1: ||u_i^T M||^2 >= (1 - ``tolerance``) S_i^2 for all i <= r, by the estimate of
    ``KrylovSpace``. Signs: the entry of largest magnitude in each column of U is positive.

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
            raise ValueError(f"matrix of shape {tuple(matrix.shape)} contains values that are not finite")
        if largest > 0:
            step = truncated_svd(matrix / largest, rank, tolerance=tolerance, generator=generator)
            return replace(step, S=step.S * largest)
    if min(matrix.shape) <= max(EXACT_BELOW, rank + OVERSAMPLING):
        exact = matrix if matrix.device.type == "mps" else matrix.double()  # an SVD in fp32 adds noise above NOISE
        # with torch's default on CUDA (Jacobi), tests on an H100 missed the accuracy of fp32
        driver = "gesvd" if matrix.is_cuda else None
        U, S, Vh = (part.to(matrix) for part in torch.linalg.svd(exact, full_matrices=False, driver=driver))
    else:
        U, S, Vh = _by_krylov(matrix, rank, tolerance, generator)
    S = S[:rank]
    energy = float(S.square().sum()) / norm**2 if norm > 0 else 0.0
    return fix_signs(LowRank(U[:, :rank], S, Vh[:rank], min(1.0, energy)))


@full_precision()
def last_triplets(matrix: Tensor, rank: int) -> tuple[LowRank, float]:
    """Return the r smallest singular triplets of a matrix, and its largest singular value.

    A randomised SVD finds only the largest ones, so the smaller of the Gram matrices M M^T and M^T M is decomposed as a
    whole, in fp64. Squaring costs digits: the relative error of S_i is about 1e-16 (S_1 / S_i)^2, less than 1e-3 for
    each direction above the rounding errors of fp32 (``usable``); below, one vector of each pair is not exact. Signs:
    see ``fix_signs``.

    matrix: (m, n), any float dtype.  ``energy`` is the share of the r triplets in ||M||_F^2.
    Raises ValueError: rank outside [1, min(m, n)], or an entry that is not finite.
    """
    if not 1 <= rank <= min(matrix.shape):
        raise ValueError(f"rank must lie in [1, {min(matrix.shape)}] for shape {tuple(matrix.shape)}, got {rank}")
    M = (matrix.cpu() if matrix.device.type == "mps" else matrix).double()
    if not torch.isfinite(M).all():
        raise ValueError(f"matrix of shape {tuple(matrix.shape)} contains values that are not finite")
    wide = M.shape[0] <= M.shape[1]
    squares, vectors = torch.linalg.eigh(M @ M.T if wide else M.T @ M)
    S = squares[:rank].flip(0).clamp(min=0).sqrt()
    one = vectors[:, :rank].flip(1)
    other = (M.T if wide else M) @ one / torch.where(S > 0, S, 1.0)
    U, V = (one, other) if wide else (other, one)
    energy = float(S.square().sum() / squares.sum()) if squares[-1] > 0 else 0.0
    U, S, Vh = (part.to(matrix.device, torch.float32) for part in (U, S, V.T))
    return fix_signs(LowRank(U, S, Vh, energy)), float(squares[-1].clamp(min=0).sqrt())


def column_signs(vectors: Tensor) -> Tensor:
    """Return the sign (r,) of the entry of largest magnitude in each column of (m, r)."""
    return torch.gather(vectors, 0, vectors.abs().argmax(dim=0, keepdim=True)).sign().squeeze(0)


def fix_signs(step: LowRank) -> LowRank:
    """Choose the sign of each pair (u_i, v_i), which an SVD leaves open: the largest entry of u_i is positive."""
    signs = column_signs(step.U)
    return LowRank(step.U * signs, step.S, step.Vh * signs[:, None], step.energy)


def completed(step: LowRank, generator: Generator) -> LowRank:
    """Replace directions that are rounding errors by S_i = 0 and random u_i, v_i, orthonormal to the others.

    A matrix of rank k < r has only k directions; the others that an SVD returns depend on the machine.
    """
    k, rank = usable(step.S), len(step.S)
    if k in (0, rank):
        return step
    S = torch.cat([step.S[:k], torch.zeros_like(step.S[k:])])
    U, V = (with_random_columns(vectors[:, :k], rank, generator) for vectors in (step.U, step.Vh.T))
    return LowRank(U, S, V.T, step.energy)


def with_random_columns(basis: Tensor, columns: int, generator: Generator) -> Tensor:
    """Extend an orthonormal basis (rows, k) by random orthonormal columns to (rows, columns)."""
    drawn = torch.randn(len(basis), columns - basis.shape[1], generator=generator).to(basis)
    return torch.cat([basis, orthonormal(drawn, basis)[0]], dim=1)


def _by_krylov(matrix: Tensor, rank: int, tolerance: float, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (m, r), S (r,), Vh (r, n) of a matrix in memory, by a ``KrylovSpace``."""
    space = KrylovSpace(tuple(matrix.shape), rank, tolerance)
    right = space.start(generator).to(matrix)
    while True:
        left = space.add_left(matrix @ right)
        if space.settled:
            return space.svd()
        right = space.add_right((left.T @ matrix).T)  # reads M row by row, which is faster than M^T Q
        if space.settled:
            return space.svd()


class KrylovSpace:
    """Leading singular triplets of a matrix M that is accessed only through products M V and M^T Q.

    Blocks: Q_1 spans M Omega, P_j spans what M^T Q_j adds to P_1 ... P_(j-1), and Q_(j+1) what M P_j adds to Q_1 ...
    Q_j. With all blocks in Q and P, M^T Q = P T for a small T, so the SVD of T gives the best rank-r approximation in
    the span of Q (Musco and Musco, arXiv:1504.05477, Alg. 2). T is decomposed in fp64, not T T^T: squaring loses the
    small directions next to a dominant one.

    The next product M P_j gives the residual of each triplet, ||M v_i - S_i u_i||^2 = ||M v_i||^2 - S_i^2, which is the
    gain of another half step for direction i. Residuals shrink about geometrically, so the last two bound the
    remaining gain. The space is settled when this bound is at most ``tolerance`` x S_i^2 for each i <= r, and the
    product U diag(S) Vh is accurate to ``PRODUCT_ERROR`` or ``PRODUCT_BLOCKS`` blocks have been computed.
    """

    def __init__(self, shape: tuple[int, int], rank: int, tolerance: float) -> None:
        self.shape, self.rank, self.tolerance = shape, rank, tolerance
        self.width = min(rank + OVERSAMPLING, *shape)
        self.Q: Tensor | None = None  # (m, columns of all blocks)
        self.P: Tensor | None = None  # (n, columns of all blocks)
        self.T = torch.zeros(0, 0, dtype=torch.float64)  # on the CPU
        self.outside: Tensor | None = None  # coefficients of M P_j in Q_(j+1), fp64, on the CPU; None until known
        self.blocks = 0  # of P
        self.direction_errors, self.product_errors = [1.0], [1.0]  # after each block

    def start(self, generator: Generator) -> Tensor:
        """Return the random Omega (n, columns), on the CPU."""
        return torch.randn(self.shape[1], self.width, generator=generator)

    def add_left(self, product: Tensor) -> Tensor:
        """Add M Omega, later M P_j; return the orthonormal block Q_j whose product M^T Q_j is needed next."""
        block, coefficients = orthonormal(product, self.Q)
        known = 0 if self.Q is None else self.Q.shape[1]
        block = block[:, : min(self.shape) - known]
        if self.blocks:
            self.outside = coefficients[known : known + block.shape[1]]
            self._measure(self.outside)
        self.Q = joined(self.Q, block)
        return block

    def add_right(self, product: Tensor) -> Tensor:
        """Add M^T Q_j; return P_j, whose product M P_j is needed next."""
        block, coefficients = orthonormal(product, self.P)
        self.P, self.outside = joined(self.P, block), None
        self.T = torch.cat([pad(self.T, (0, 0, 0, block.shape[1])), coefficients], dim=1)
        self.blocks += 1
        return block

    def _measure(self, outside: Tensor) -> None:
        """Record the errors after the last block. Eigenvalues of T T^T in fp64 are accurate enough here, and cheap."""
        squares, vectors = torch.linalg.eigh(self.T @ self.T.T)
        S, X = squares.flip(0)[: self.rank].clamp(min=0).sqrt(), vectors.flip(1)[:, : self.rank]
        residuals = torch.linalg.vector_norm(outside @ X[-outside.shape[1] :], dim=0)
        real = usable(S)
        self.direction_errors.append(float((residuals[:real] / S[:real]).square().max()) if real else 0.0)
        self.product_errors.append(float(residuals.norm() / S.norm()) if real else 0.0)

    @property
    def settled(self) -> bool:
        """Return whether no further product is needed."""
        if self.outside is None:
            return self.blocks > 0 and self.Q.shape[1] == min(self.shape)
        if self.blocks >= MAX_BLOCKS:
            return True
        # `truncated_svd` decomposes a small matrix exactly, so products alone must give the same accuracy
        spent = self.blocks >= PRODUCT_BLOCKS and min(self.shape) > EXACT_BELOW
        product = spent or still_to_gain(self.product_errors) <= PRODUCT_ERROR
        return product and still_to_gain(self.direction_errors) <= self.tolerance

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return U (m, r), S (r,), Vh (r, n) from all products added so far."""
        small = self.T.T  # Q^T M P; below also the part of M P_j in Q_(j+1), if known
        if self.outside is not None:
            small = torch.cat([small, pad(self.outside, (small.shape[1] - self.outside.shape[1], 0))])
        U, S, Vh = torch.linalg.svd(small, full_matrices=False)
        kept = slice(0, self.rank)
        return self.Q @ U[:, kept].to(self.Q), S[kept].to(self.Q), Vh[kept].to(self.P) @ self.P.T


def orthonormal(product: Tensor, basis: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (Q, C) with product = [basis, Q] C, where Q is orthonormal and orthogonal to the basis.

    It projects twice, because the remainder of the first projection may be mostly rounding error. If a column has no
    remainder (for example, because of zero rows of M), the result still overlaps the basis; such columns of Q are
    replaced by random ones, with 0 in C. C is fp64 and on the CPU.
    """
    if basis is None:
        Q, R = torch.linalg.qr(product)
        return Q, R.cpu().double()
    first = basis.T @ product
    Q, R1 = torch.linalg.qr(product - basis @ first)
    second = basis.T @ Q
    Q, R2 = torch.linalg.qr(Q - basis @ second)
    C = torch.cat([first + second @ R1, R2 @ R1]).cpu().double()
    lost = (torch.linalg.vector_norm(basis.T @ Q, dim=0) > LOST).cpu()
    if lost.any() and basis.shape[1] + Q.shape[1] <= len(Q):
        Q, C[basis.shape[1] :][lost] = refilled(Q, lost, basis), 0.0
    return Q, C


def refilled(Q: Tensor, lost: Tensor, basis: Tensor) -> Tensor:
    """Return Q with its ``lost`` columns (boolean) replaced by random ones, orthonormal to the basis and the others."""
    known = torch.cat([basis, Q[:, ~lost]], dim=1)
    generator = torch.Generator().manual_seed(known.shape[1])
    drawn = torch.randn(len(Q), int(lost.sum()), generator=generator).to(Q)
    for _ in range(2):
        drawn = torch.linalg.qr(drawn - known @ (known.T @ drawn)).Q
    Q = Q.clone()
    Q[:, lost] = drawn
    return Q


def joined(blocks: Tensor | None, block: Tensor) -> Tensor:
    """Return the columns of all blocks; None: there are none yet."""
    return block if blocks is None else torch.cat([blocks, block], dim=1)


def usable(S: Tensor, largest: float | None = None) -> int:
    """Return how many singular values (descending) exceed the rounding errors of fp32; 0 for a zero matrix.

    largest: the largest one of the matrix; None: S[0].
    """
    return int((NOISE * (S[0] if largest is None else largest) < S).sum())


def still_to_gain(errors: list[float]) -> float:
    """Bound the remaining gain by a geometric series, from the errors after each block."""
    ratio = max(math.sqrt(errors[-1] / errors[-2]) if errors[-2] > 0 else 0.0, FASTEST)
    return errors[-1] * ratio / (1 - ratio) if ratio < 1 else math.inf
