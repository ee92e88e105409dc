"""LoRA-One (arXiv:2502.01235): B A is the best rank-r approximation of the negative one-step gradient, scaled."""

from dataclasses import replace

import torch
from torch import Tensor

from lora_one.config.methods.gradient import LoraOneSettings
from lora_one.initialization.methods.scale import factor_scale
from lora_one.linalg import LowRank, with_random_columns
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


def shuffled(settings: LoraOneSettings, layer: LayerView, found: AdapterFactors) -> AdapterFactors:
    """Return a control: factors as large as those of LoRA-One, without its directions or without its order.

    With B = U diag(b) and A = diag(a) Vh (``descent_factors``, at the scale of the start that is not shuffled):
    directions: U and Vh become random orthonormal vectors; b and a, and so every norm of B A, stay.
    spectrum: the pairs (b_i, a_i) are permuted at random; U and Vh, and so the subspaces of B A, stay. Directions that
    the gradient lacks (b_i = 0) keep their place.

    layer.generator: of the random numbers.
    """
    b, a = found.B.norm(dim=0), found.A.norm(dim=1)
    if settings.shuffle == "directions":
        U, V = (with_random_columns(torch.empty(side, 0), layer.rank, layer.generator).to(b) for side in layer.shape)
        return replace(found, B=U * b, A=a[:, None] * V.T)
    used = b.nonzero().flatten()
    order = used[torch.randperm(len(used), generator=layer.generator).to(used.device)]
    b_ratio, a_ratio = torch.ones_like(b), torch.ones_like(a)
    b_ratio[used], a_ratio[used] = b[order] / b[used], a[order] / a[used]
    return replace(found, B=found.B * b_ratio, A=found.A * a_ratio[:, None])
