"""LoRA-XS (arXiv:2405.17604): frozen singular vectors of the weight; only the r x r core between them is trained."""

import torch

from lora_one.config.methods.weights import LoraXsSettings
from lora_one.linalg import truncated_svd
from lora_one.types import AdapterFactors, LayerView


def factors(settings: LoraXsSettings, layer: LayerView, step: None = None) -> AdapterFactors:
    """Return B = U_r, A = diag(S_r) Vh_r and R ~ N(0, ``lora_R_std``^2) with W = U diag(S) Vh; W is not changed.

    The singular values are part of A, as in the authors' code.  B (m, r), A (r, n) and R (r, r) are fp32.
    """
    W = truncated_svd(layer.weight(), layer.rank, tolerance=settings.tolerance, generator=layer.generator)
    R = settings.lora_R_std * torch.randn(layer.rank, layer.rank, generator=layer.generator)
    return AdapterFactors(W.U, W.S[:, None] * W.Vh, R=R.to(W.U.device))
