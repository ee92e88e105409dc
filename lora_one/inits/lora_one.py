"""LoRA-One: the adapters start at the best rank-r approximation of the one-step full gradient."""

import torch
from torch import Tensor

from lora_one.config import GradientInit
from lora_one.linalg import LowRank, truncated_svd
from lora_one.types import AdapterFactors, LayerView


def lora_one_factors(init: GradientInit, layer: LayerView, gradient: Tensor) -> AdapterFactors:
    """B A = c^2 [-G]_r with balanced factors, c by ``init.scale``; W is not changed.

    With -G = U diag(S) Vh:  B = c U_r S^1/2,  A = c S^1/2 Vh_r.  Source: arXiv:2502.01235, Algorithm 1.

    gradient: G (m, n), any float dtype, decomposed in fp32.  Returns B (m, r), A (r, n), fp32; the record
    holds the captured energy ||[G]_r||^2 / ||G||^2.
    Raises ValueError: G is zero or not finite, or r is outside [1, min(m, n)].
    """
    if not gradient.any():
        raise ValueError(f"the gradient of layer {layer.name} is zero: nothing to start from")
    step = truncated_svd(-gradient, layer.rank, tolerance=init.tolerance, generator=layer.generator)
    B, A = spectral_factors(step, normalize=init.normalize)
    scale = factor_scale(init, layer)
    return AdapterFactors(B * scale, A * scale, record={"captured_energy": step.energy})


def spectral_factors(step: LowRank, normalize: str) -> tuple[Tensor, Tensor]:
    """Split a low-rank step evenly: B = U S^1/2, A = S^1/2 Vh, so B A = [M]_r and B^T B = A A^T.

    normalize: "s0" divides the singular values by the largest (Algorithm 1, line 3: the start no longer depends
    on the loss's scale), "none" keeps them (the paper's theory).
    """
    S = step.S / step.S[0] if normalize == "s0" else step.S
    root = S.sqrt()
    return step.U * root, root[:, None] * step.Vh


def factor_scale(init: GradientInit, layer: LayerView) -> float:
    """What each of the two factors is multiplied by.

    stable: gamma^-1/2, gamma = 1/s of Algorithm 1.  gd: 1/s.  unit: 1.
    weightS: mean over i <= r of (sigma_i(W) / s)^1/2.  The last three as in the method's released code.
    """
    if init.scale == "stable":
        return init.gamma**-0.5
    if init.scale == "gd":
        return 1.0 / layer.scaling
    if init.scale == "weightS":
        W = truncated_svd(layer.weight(), layer.rank, tolerance=init.tolerance, generator=layer.generator)
        return float(torch.sqrt(W.S / layer.scaling).mean())
    return 1.0
