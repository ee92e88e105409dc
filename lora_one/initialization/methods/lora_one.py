"""LoRA-One (arXiv:2502.01235): B A is the best rank-r approximation of the negative one-step gradient, scaled."""

import torch
from torch import Tensor

from lora_one.config.methods.gradient import LoraOneSettings
from lora_one.initialization.methods.scale import factor_scale
from lora_one.linalg import LowRank
from lora_one.types import AdapterFactors, LayerView


def factors(settings: LoraOneSettings, layer: LayerView, step: LowRank) -> AdapterFactors:
    """Return balanced factors with B A = c^2 [-G]_r; ``init.scale`` chooses c (stable: gamma^-1/2). W is not changed.

    With -G = U diag(S) Vh:  B = c U_r S^1/2,  A = c S^1/2 Vh_r.  Source: arXiv:2502.01235, Algorithm 1.

    step: [G]_r, the truncated SVD of the mean gradient.  B (m, r) and A (r, n) are fp32.
    """
    B, A = descent_factors(step, normalize=settings.normalize)
    scale = factor_scale(settings, layer, stable=settings.gamma**-0.5)
    return AdapterFactors(B * scale, A * scale)


def descent_factors(step: LowRank, normalize: str) -> tuple[Tensor, Tensor]:
    """Split the rank-r descent step evenly: B A = [-G]_r and B^T B = A A^T.

    normalize: "s0" divides the singular values by the largest (Algorithm 1, line 3: the result then does not depend
    on the scale of the loss), "none" keeps them (the paper's theory).
    If S_i is 0, because G has too low a rank, the column of B is 0 and the row of A is as long as the first one. If
    both were 0, they could not be trained. The function does not change, and the direction is trained as in plain LoRA.
    """
    S = step.S / step.S[0] if normalize == "s0" else step.S
    return step.U * S.sqrt(), -torch.where(S > 0, S, S[0]).sqrt()[:, None] * step.Vh
