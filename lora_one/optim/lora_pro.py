"""LoRA-Pro: AdamW on the low-rank gradient of W_eff that is closest to the full gradient (arXiv:2407.18242)."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Self

from torch import Tensor

from lora_one.optim.matrix_functions import SMALLEST, eigen, pseudo_power, wide
from lora_one.optim.paired import Batch, PairOptimizer
from lora_one.optim.pairs import Pair


class LoraPro(PairOptimizer):
    """With h_A, h_B of `Factors.adjusted` for the gradients g_A = s B^T G and g_B = s G A^T, a step is

        G~ = s (B h_A + h_B A)                                         (m, n), the best approximation of G
        M <- beta1 M + (1 - beta1) G~      V <- beta2 V + (1 - beta2) G~^2      G^ = M^ / (sqrt(V^) + eps)
        h_A, h_B of s B^T G^ and s G^ A^T      A <- (1 - lr wd) A - lr h_A      B <- (1 - lr wd) B - lr h_B

    M^ and V^ are divided by 1 - beta^t, t = 1 in the first step. Source: arXiv:2407.18242, Theorem 2.1 and its AdamW
    algorithm. M and V have the size of W: 8 m n bytes a layer. The r x r work of equal shapes is one batch; the full
    matrices are computed layer by layer, so only one G~ is in memory.

    Create it by `create_pair_optimizer`. betas, eps, weight_decay, options: as in torch's AdamW, which steps the other
    parameters with the same values.
    """

    def __init__(
        self,
        params: Any,
        pairs: Iterable[Pair],
        lr: float = 2e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Any,
    ):
        super().__init__(params, pairs, lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, **options)

    def step_batches(self, batches: Iterator[Batch]) -> None:
        for batch in batches:
            A, B, s, group = batch.A, batch.B, batch.scaling, batch.group
            factors = Factors.of(batch)
            g_A, g_B = batch.g_A, batch.g_B  # stacks of this step only, overwritten by s B^T G^ and s G^ A^T
            h_A, h_B = (h.to(A) for h in factors.shortest(wide(g_A), wide(g_B)))
            shape = (B.shape[1], A.shape[2])
            moments = zip(batch.state("exp_avg", shape), batch.state("exp_avg_sq", shape), strict=True)
            for i, (M, V) in enumerate(moments):
                G = (B[i] @ h_A[i]).addmm_(h_B[i], A[i]).mul_(s)
                G = adam_direction(G, M, V, group["betas"], group["eps"], batch.step)
                g_A[i], g_B[i] = s * (B[i].mT @ G), s * (G @ A[i].mT)
            h_A, h_B = (h.to(A) for h in factors.adjusted(wide(g_A), wide(g_B)))
            batch.update(-group["lr"] * h_A, -group["lr"] * h_B, 1 - group["lr"] * group["weight_decay"])


class Factors(NamedTuple):
    """The pairs of a batch in fp64, because inverses of Gram matrices square the ratios of singular values.

    A (k, r, n), B (k, m, r), scaling s.  gram_A, gram_B: eigenvalues and eigenvectors of A A^T and B^T B, see `eigen`;
    their pseudo-inverses are used.
    """

    A: Tensor
    B: Tensor
    s: float
    gram_A: tuple[Tensor, Tensor]
    gram_B: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, batch: Batch) -> Self:
        """Return the factors of a batch, with the eigenvalues of their Gram matrices."""
        return cls(wide(batch.A), wide(batch.B), batch.scaling, eigen(batch.A.mT), eigen(batch.B))

    def shortest(self, g_A: Tensor, g_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return h_A = (B^T B)^-1 g_A / s^2 and h_B = (I - P_B) g_B (A A^T)^-1 / s^2, which give the best G~.

        P_B = B (B^T B)^-1 B^T. B = 0 has h_A = 0 = g_A and h_B = g_B (A A^T)^-1 / s^2, the paper's formula for the
        first step.
        """
        inverse_A, inverse_B = pseudo_power(*self.gram_A, -1), pseudo_power(*self.gram_B, -1)
        beside_B = g_B - self.B @ (inverse_B @ (self.B.mT @ g_B))
        return inverse_B @ g_A / self.s**2, beside_B @ inverse_A / self.s**2

    def adjusted(self, g_A: Tensor, g_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return h_A + X A and h_B - B X, with h_A and h_B of `shortest`: the same G~, closest to g_A and g_B.

        X minimises ||h_A + X A - g_A||^2 + ||h_B - B X - g_B||^2: B^T B X + X A A^T = -h_A A^T (Theorem 2.2).
        """
        h_A, h_B = self.shortest(g_A, g_B)
        X = sylvester(self.gram_B, self.gram_A, -h_A @ self.A.mT)
        return h_A + X @ self.A, h_B - self.B @ X


def sylvester(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], C: Tensor) -> Tensor:
    """Return X with L X + X R = C, for L = U diag(u) U^T and R = V diag(v) V^T as `eigen` gives them.

    X is zero between directions that are zero in both: there C is zero up to rounding.
    """
    (u, U), (v, V) = left, right
    sums = u[..., :, None] + v[..., None, :]
    return U @ ((U.mT @ C @ V) / sums.clamp_min(SMALLEST)).masked_fill(sums == 0, 0.0) @ V.mT


def adam_direction(G: Tensor, M: Tensor, V: Tensor, betas: tuple[float, float], eps: float, t: int) -> Tensor:
    """Update the moments M and V in place, and return M^ / (sqrt(V^) + eps) in the memory of G."""
    beta1, beta2 = betas
    M.lerp_(G, 1 - beta1)
    V.mul_(beta2).addcmul_(G, G, value=1 - beta2)
    G.copy_(V).div_(1 - beta2**t).sqrt_().add_(eps)
    return G.reciprocal_().mul_(M).div_(1 - beta1**t)
