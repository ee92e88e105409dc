"""LoRA-Muon: spectral steepest descent on W_eff through both factors (arXiv:2606.12921)."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from lora_one.errors import UsageError
from lora_one.optim.matrix_functions import inverse_root, matrix_sign
from lora_one.optim.paired import Batch, PairOptimizer
from lora_one.optim.pairs import Pair


class LoraMuon(PairOptimizer):
    """With M_A, M_B the moving averages of the gradients, and c = sqrt(1 - wd lr), a step is

        D_B = -lr / (2 s) msign(M_B R_A) R_A      R_A = (A A^T)^-1/2      B <- c B + D_B / c
        D_A = -lr / (2 s) R_B msign(R_B M_A)      R_B = (B^T B)^-1/2      A <- c A + D_A / c

    so s D_B A and s B D_A each have the spectral norm lr / 2, and decay multiplies B A by 1 - wd lr. Source:
    arXiv:2606.12921; the division by s, which makes lr a step of W_eff, is ours. msign: `matrix_sign`.

    Any R with R^T R = (A A^T)^-1 gives the same step as the symmetric root, because msign(M O) = msign(M) O for an
    orthogonal O. Here it is an inverse Cholesky factor, which is batched on every device and never waits for it.
    Damping is relative (see `inverse_root`), so at B = 0, where M_A = 0 and msign(0) = 0, only B moves.

    Create it by `create_pair_optimizer`. momentum: of M.  damping: relative to the norm of each Gram matrix.
    sign_steps: polynomials of msign.  options: arguments of torch's AdamW, for the other parameters.
    """

    def __init__(
        self,
        params: Any,
        pairs: Iterable[Pair],
        lr: float = 0.02,
        momentum: float = 0.9,
        damping: float = 1e-5,
        sign_steps: int = 8,
        weight_decay: float = 0.0,
        **options: Any,
    ):
        super().__init__(params, pairs, lr, weight_decay=weight_decay, **options)
        self._set_defaults(momentum=momentum, damping=damping, sign_steps=sign_steps)
        for group in map(self._groups().get, (id(pair.B) for pair in self.pairs)):
            if group["lr"] * group["weight_decay"] >= 1:
                raise UsageError(
                    f"a step multiplies B A by 1 - weight_decay x lr, which is not positive for weight_decay="
                    f"{group['weight_decay']:g} and lr={group['lr']:g}: lower one of them"
                )

    @classmethod
    def first_change(cls, lr: float, scaling: float, m: int, n: int) -> float:
        """Return lr / 2, whatever the gradient is."""
        return lr / 2

    def step_batches(self, batches: Iterator[Batch]) -> None:
        for batch in batches:
            group, half = batch.group, batch.group["lr"] / (2 * batch.scaling)
            M_A = averaged(batch.state("momentum_A", batch.A.shape[1:]), batch.g_A, group["momentum"])
            M_B = averaged(batch.state("momentum_B", batch.B.shape[1:]), batch.g_B, group["momentum"])
            R_A = inverse_root(batch.A @ batch.A.mT, group["damping"])
            R_B = inverse_root(batch.B.mT @ batch.B, group["damping"])
            D_B = matrix_sign(M_B @ R_A.mT, group["sign_steps"]) @ R_A
            D_A = R_B.mT @ matrix_sign((R_B @ M_A).mT, group["sign_steps"]).mT
            c = (1 - group["weight_decay"] * group["lr"]) ** 0.5
            batch.update(-half / c * D_A, -half / c * D_B, c)


def averaged(states: list[Tensor], gradients: Tensor, momentum: float) -> Tensor:
    """Update the moving averages in place, M <- momentum M + (1 - momentum) g, and return them as one stack."""
    average = torch.stack(states).lerp_(gradients, 1 - momentum)
    torch._foreach_copy_(states, list(average.unbind()))
    return average
