"""LoRA-XS (arXiv:2405.17604): the weight's own singular vectors, frozen; only the r x r core between them trains."""

import torch

from lora_one.config.methods.weights import LoraXsSettings
from lora_one.linalg import truncated_svd
from lora_one.types import AdapterFactors, LayerView


def factors(settings: LoraXsSettings, layer: LayerView, step: None = None) -> AdapterFactors:
    """With W = U diag(S) Vh: B = U_r, A = diag(S_r) Vh_r, R ~ N(0, ``lora_R_std``^2); W is not changed.

    The singular values sit in A, as in the authors' code.  Returns B (m, r), A (r, n), R (r, r), fp32.
    """
    W = truncated_svd(layer.weight(), layer.rank, tolerance=settings.tolerance, generator=layer.generator)
    R = settings.lora_R_std * torch.randn(layer.rank, layer.rank, generator=layer.generator)
    return AdapterFactors(W.U, W.S[:, None] * W.Vh, R=R.to(W.U.device))
