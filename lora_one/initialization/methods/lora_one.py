"""LoRA-One: the adapters start at the best rank-r approximation of the one-step full gradient."""

import torch
from torch import Tensor

from lora_one.config.methods.gradient import LoraOneSettings
from lora_one.initialization.methods.scale import factor_scale
from lora_one.linalg import LowRank
from lora_one.types import AdapterFactors, LayerView


def factors(settings: LoraOneSettings, layer: LayerView, step: LowRank) -> AdapterFactors:
    """B A = c^2 [-G]_r with balanced factors, c by ``init.scale`` (stable: gamma^-1/2); W is not changed.

    With -G = U diag(S) Vh:  B = c U_r S^1/2,  A = c S^1/2 Vh_r.  Source: arXiv:2502.01235, Algorithm 1.

    step: [G]_r, the truncated SVD of the mean gradient.  Returns B (m, r), A (r, n), fp32.
    """
    B, A = descent_factors(step, normalize=settings.normalize)
    scale = factor_scale(settings, layer, stable=settings.gamma**-0.5)
    return AdapterFactors(B * scale, A * scale)


def descent_factors(step: LowRank, normalize: str) -> tuple[Tensor, Tensor]:
    """Split the rank-r descent step evenly: B A = [-G]_r and B^T B = A A^T.

    normalize: "s0" divides the singular values by the largest (Algorithm 1, line 3: the start no longer depends
    on the loss's scale), "none" keeps them (the paper's theory).
    Where S_i is 0 because G has no such direction, B's column is 0 and A's row is as long as the first: zero in both
    could never train. The function is unchanged and the direction learns as in plain LoRA.
    """
    S = step.S / step.S[0] if normalize == "s0" else step.S
    return step.U * S.sqrt(), -torch.where(S > 0, S, S[0]).sqrt()[:, None] * step.Vh
