"""Symbols, everywhere (y = x @ W.T as in torch.nn.Linear):

    m out_features   n in_features   r rank   s adapter scaling (alpha/sqrt(r) with rsLoRA, alpha/r without)
    W (m, n) frozen weight    G (m, n) mean gradient dL/dW
    B (m, r) up-projection    A (r, n) down-projection    W_eff = W + s * B @ A
    R (r, r) core, of methods that train it alone: B and A are frozen there and W_eff = W + s * B @ R @ A

The paper's A is our B and the reverse: we keep PEFT's letters.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the entry point reads this file before it may import torch
    from torch import Generator, Tensor


@dataclass(frozen=True)
class Example:
    """One prompt and the response to learn; ``gold`` is what a benchmark compares with, if there is one.

    id: its name in a benchmark of several parts, ``<part>/<number>``; elsewhere its place is enough.
    texts, label: what a classification head reads, one sentence or two (COPA and WiC: all their fields) without a
    template, and the index of its class.
    """

    prompt: str
    response: str
    gold: str | dict[str, str] | None = None
    id: str | None = None
    texts: tuple[str, ...] = ()
    label: int | None = None


@dataclass(frozen=True)
class LayerView:
    """What an initialisation may know of one target layer.

    name: dotted path in the base model.  weight: gives W (m, n) in fp32 (dequantised where it is quantised).
    original: gives W (m, n) in fp32 as it was before the base was quantised (read from its files); None: not asked for.
    rank, scaling: r and s.  generator: CPU random numbers of this layer alone, from the seed and the name.
    """

    name: str
    shape: tuple[int, int]
    weight: Callable[[], "Tensor"]
    rank: int
    scaling: float
    generator: "Generator"
    original: "Callable[[], Tensor] | None" = None


@dataclass(frozen=True)
class AdapterFactors:
    """Start of one adapter: B (m, r), A (r, n) and, where only a core trains, R (r, r), all fp32.

    ``shift_base``: the method starts from the unchanged function, so the base becomes W - s B A.
    """

    B: "Tensor"
    A: "Tensor"
    shift_base: bool = False
    R: "Tensor | None" = None
