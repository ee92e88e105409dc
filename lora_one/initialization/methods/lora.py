"""LoRA as published (A Kaiming, B zero; arXiv:2106.09685) and variants with other distributions of the factors."""

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.nn import init as fill

from lora_one.config.methods.plain import LoraSettings
from lora_one.types import AdapterFactors, LayerView

DISTRIBUTIONS: dict[str, Callable[[Tensor, float, Generator], Tensor]] = {
    "kaiming": lambda t, std, g: fill.kaiming_uniform_(t, a=math.sqrt(5), generator=g),
    "fan_out_kaiming": lambda t, std, g: fill.kaiming_normal_(t, mode="fan_out", generator=g),
    "gaussian": lambda t, std, g: fill.normal_(t, std=std, generator=g),
    "xavier": lambda t, std, g: fill.xavier_normal_(t, generator=g),
    "orthogonal": lambda t, std, g: fill.orthogonal_(t, generator=g),
    "unit": lambda t, std, g: fill.normal_(t, generator=g),
    "zeros": lambda t, std, g: fill.zeros_(t),
}


def factors(settings: LoraSettings, layer: LayerView, step: None = None) -> AdapterFactors:
    """Return B (m, r) and A (r, n), fp32, each drawn from its distribution.

    ``lora_A_std`` and ``lora_B_std`` are the standard deviations of "gaussian". If B A is not zero, W becomes
    W - s B A, so the function does not change.
    """
    rows, columns = layer.shape
    A = DISTRIBUTIONS[settings.lora_A](torch.empty(layer.rank, columns), settings.lora_A_std, layer.generator)
    B = DISTRIBUTIONS[settings.lora_B](torch.empty(rows, layer.rank), settings.lora_B_std, layer.generator)
    return AdapterFactors(B, A, shift_base=bool((B @ A).any()))
