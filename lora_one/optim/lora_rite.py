"""LoRA-RITE: adaptive steps that do not depend on how B A is factorised (arXiv:2410.20625)."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_one.optim.matrix_functions import orthonormal_basis, power_of_two
from lora_one.optim.paired import Batch, PairOptimizer
from lora_one.optim.pairs import Pair


class LoraRite(PairOptimizer):
    """With the polar decompositions B = U_B T_B and A^T = U_A T_A, the step of A at time t is

        g = g_A^T T_B^-1    (n, r), scaled so that the joint norm of all g of the model is at most max_norm
        P = U_B,t^T U_B,t-1      V <- b2 P V P^T + (1 - b2) g^T g / n      M <- b1 M P^T + (1 - b1) g V^-1/2
        A^T <- (1 - lr wd) A^T - lr M T_B^-T

    with b = beta (1 - beta^(t-1)) / (1 - beta^t), Adam's bias correction, and V^-1/2 with the eigenvalues
    1 / (sqrt(w) + eps). The step of B is the same with T_A, both from the old factors. Source: arXiv:2410.20625 and
    its code, from which the clipping and the means are; the paper's escaped mass is switched off there and left out.

    A factor without full rank has no T^-1. The pseudo-inverse is used (see `orthonormal_basis`): a direction in which
    the partner is zero has no gradient and gets no step, so at B = 0 only B moves, and moments in it are dropped.

    Create it by `create_pair_optimizer`. max_norm: 0 switches the clipping off.  betas, eps, weight_decay, options: as
    in torch's AdamW, which steps the other parameters with the same values.
    """

    def __init__(
        self,
        params: Any,
        pairs: Iterable[Pair],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        max_norm: float = 1.0,
        weight_decay: float = 0.0,
        **options: Any,
    ):
        super().__init__(params, pairs, lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, **options)
        self._set_defaults(max_norm=max_norm)

    @classmethod
    def first_change(cls, lr: float, scaling: float, m: int, n: int) -> float:
        """Return s lr sqrt(min(m, n)): M = g V^-1/2 with V = g^T g / n has the singular values sqrt(n)."""
        return scaling * lr * min(m, n) ** 0.5

    def step_batches(self, batches: Iterator[Batch]) -> None:
        halves = [(batch, half_A(batch), half_B(batch)) for batch in batches]
        norm = joint_norm([half.gradient for _, *both in halves for half in both])
        for batch, for_A, for_B in halves:
            group = batch.group
            if group["max_norm"]:
                for half in (for_A, for_B):
                    half.gradient.div_((norm / group["max_norm"]).clamp_min(1.0).to(half.gradient.device))
            step_A, step_B = (half.direction(group["betas"], group["eps"], batch.step) for half in (for_A, for_B))
            lr = group["lr"]
            batch.update(-lr * step_A.mT, -lr * step_B, 1 - lr * group["weight_decay"])


class Half(NamedTuple):
    """The step of one factor of each pair of a batch, all in the form of B: (k, m, r).

    gradient: g T^-1.  basis, inverse: U (k, l, r) and T^-1 (k, r, r) of the partner.  last_basis, M, V: the state.
    V is fp64: it has the squares of the singular values of g, whose small ones fp32 would round away.
    """

    gradient: Tensor
    basis: Tensor
    inverse: Tensor
    last_basis: list[Tensor]
    M: list[Tensor]
    V: list[Tensor]

    def direction(self, betas: tuple[float, float], eps: float, t: int) -> Tensor:
        """Update the state and return M T^-T: (k, m, r)."""
        b1, b2 = (beta * (1 - beta ** (t - 1)) / (1 - beta**t) for beta in betas)
        P = self.basis.mT @ torch.stack(self.last_basis)
        g64, P64, V64 = self.gradient.double(), P.double(), torch.stack(self.V).double()
        V = b2 * (P64 @ V64 @ P64.mT) + (1 - b2) / g64.shape[1] * (g64.mT @ g64)
        scaled = (g64 @ inverse_square_root(V, eps)).to(P.dtype)
        M = b1 * (torch.stack(self.M) @ P.mT) + (1 - b1) * scaled
        for states, values in ((self.last_basis, self.basis), (self.V, V), (self.M, M)):
            torch._foreach_copy_(states, list(values.unbind()))
        return M @ self.inverse.mT


def joint_norm(gradients: list[Tensor]) -> Tensor:
    """Return the Frobenius norm of all gradients together, on the device of the first; a 0-d tensor.

    They are divided by a power of two before they are squared, so squares do not overflow. NaN: it is not finite.
    """
    if not gradients:
        return torch.zeros(())
    device = gradients[0].device
    largest = torch.stack([gradient.abs().amax().to(device) for gradient in gradients]).amax()
    scale = power_of_two(largest)
    squares = [(gradient / scale.to(gradient.device)).square().sum().to(device) for gradient in gradients]
    norm = scale * sum(squares, torch.zeros((), device=device)).sqrt()
    return norm.masked_fill(norm.isinf(), torch.nan)  # NaN ends the step in `inverse_square_root`; 0 would be no step


def half_A(batch: Batch) -> Half:
    """Return the step of A^T, whose partner is B."""
    return half(batch, "A", batch.g_A.mT, batch.B)


def half_B(batch: Batch) -> Half:
    """Return the step of B, whose partner is A^T."""
    return half(batch, "B", batch.g_B, batch.A.mT)


def half(batch: Batch, name: str, gradient: Tensor, partner: Tensor) -> Half:
    """Return the step of the factor of this name, from its gradient and its partner, both tall."""
    basis, inverse = orthonormal_basis(partner)
    r = partner.shape[-1]
    last_basis = batch.state(f"basis_{name}", partner.shape[1:])
    M = batch.state(f"exp_avg_{name}", gradient.shape[1:])
    V = batch.state(f"exp_avg_sq_{name}", (r, r), torch.float64)
    return Half(gradient @ inverse, basis, inverse, last_basis, M, V)


def inverse_square_root(V: Tensor, eps: float) -> Tensor:
    """Return the symmetric matrix with V's eigenvectors and the eigenvalues 1 / (sqrt(w) + eps): (k, r, r)."""
    values, vectors = torch.linalg.eigh((V + V.mT) / 2)
    return (vectors / (values.clamp_min(0).sqrt() + eps)[..., None, :]) @ vectors.mT
