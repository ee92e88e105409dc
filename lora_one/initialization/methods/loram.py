"""LoRAM (arXiv:2507.06558): a fixed orthonormal basis with the magnitude of a spectral start."""

import math

import torch
from torch import Tensor

from lora_one.config.methods.weights import LoramSettings
from lora_one.types import AdapterFactors, LayerView


def factors(settings: LoramSettings, layer: LayerView, step: None = None) -> AdapterFactors:
    """Return B = (beta / s^1/2) Phi_m and A = (beta / s^1/2) Phi_n^T; W becomes W - s B A.

    beta^4 = Q ||W||_F^2 / r with Q = ln(r) / ln(min(m, n)), so ||s B A||_F = Q^1/2 ||W||_F. Phi: see ``sines``.
    The formulas are those of the paper for s = 1; the division by s^1/2 keeps s B A the same for every s.

    Only the norm of W matters, and nothing is random.  B (m, r) and A (r, n) are fp32.
    Raises ValueError: W is zero, so both factors would be.
    """
    m, n = layer.shape
    norm = float(layer.weight().norm())
    if norm == 0:
        raise ValueError(
            f"the weight of {layer.name} is zero, so both factors would be zero and could not be trained: remove the "
            "layer from peft.lora_target_modules, or set init=lora"
        )
    beta = (math.log(layer.rank) / math.log(min(m, n)) * norm**2 / layer.rank) ** 0.25
    size = beta / layer.scaling**0.5
    return AdapterFactors(size * sines(m, layer.rank), size * sines(n, layer.rank).T, shift_base=True)


def sines(k: int, r: int) -> Tensor:
    """Return Phi (k, r) with Phi[i, j] = (2 / (k + 1))^1/2 sin((i + 1) (j + 1) pi / (k + 1)); fp32.

    Its columns are orthonormal: they are the first r vectors of the discrete sine transform.
    """
    i, j = torch.arange(1, k + 1, dtype=torch.float64), torch.arange(1, r + 1, dtype=torch.float64)
    return (math.sqrt(2 / (k + 1)) * torch.sin(torch.outer(i, j) * (math.pi / (k + 1)))).float()
