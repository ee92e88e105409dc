"""The scale of the factors, for the methods that use a gradient."""

import torch

from lora_one.config.methods.gradient import LoraGASettings, LoraOneSettings
from lora_one.linalg import truncated_svd
from lora_one.types import LayerView


def factor_scale(settings: LoraOneSettings | LoraGASettings, layer: LayerView, stable: float) -> float:
    """Return the factor by which both B and A are multiplied, as in the methods' published code.

    stable, search: the argument ``stable``, which a search then changes.  gd: 1/s.  unit: 1.
    weightS: the mean over i <= r of (sigma_i(W) / s)^1/2.
    """
    if settings.scale in {"stable", "search"}:
        return stable
    if settings.scale == "gd":
        return 1.0 / layer.scaling
    if settings.scale == "unit":
        return 1.0
    W = truncated_svd(layer.weight(), layer.rank, tolerance=settings.tolerance, generator=layer.generator)
    return float(torch.sqrt(W.S / layer.scaling).mean())
