"""Symbols used everywhere (y = x @ W.T as in torch.nn.Linear):

    m out_features   n in_features   r rank   s adapter scaling (alpha/sqrt(r) with rsLoRA, alpha/r without)
    W (m, n) frozen weight    G (m, n) mean gradient dL/dW
    B (m, r) up-projection    A (r, n) down-projection    W_eff = W + s * B @ A
    R (r, r) core, of methods that train it alone: B and A are frozen there and W_eff = W + s * B @ R @ A

The paper's A is our B and the reverse: we keep PEFT's letters.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # the entry point imports this file before torch
    from torch import Generator, Tensor

# Options of the preconditioner, read by config/optimizers.py and by optim/, neither of which imports the other.
Damping = Literal["absolute", "relative"]  # lambda as it is, or multiplied by the mean diagonal of the Gram matrix
Order = Literal["simultaneous", "sequential"]  # both factors step from the same point, or B after A


@dataclass(frozen=True)
class Example:
    """One prompt and the response to learn.

    gold: reference answer of a benchmark; None: there is none.
    id: ``<part>/<number>`` in a benchmark of several parts; otherwise None, the position identifies the example.
    texts, label: input of a classification head, one or two sentences without a template (COPA and WiC: all their
    fields), and the index of its class.
    messages: the turns of a conversation as (role, text); prompt and response then hold the same text, for searches.
    """

    prompt: str
    response: str
    gold: str | dict[str, str] | None = None
    id: str | None = None
    texts: tuple[str, ...] = ()
    label: int | None = None
    messages: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class LayerView:
    """What an initialisation method can read of one target layer.

    name: dotted path in the base model.  weight: returns W (m, n) in fp32 (dequantised if it is quantised).
    original: returns W (m, n) in fp32 before quantisation (read from the model's files); None: not needed.
    rank, scaling: r and s.  generator: CPU generator for this layer, from the seed and the name.
    """

    name: str
    shape: tuple[int, int]
    weight: Callable[[], "Tensor"]
    rank: int
    scaling: float
    generator: "Generator"
    original: "Callable[[], Tensor] | None" = None


@dataclass(frozen=True)
class Measured:
    """What a method that chooses the ranks keeps of one layer's gradient G, for any rank up to R.

    importance: decides the rank.  A (R, n): the first r rows are those of rank r.  GA (m, R): G A^T.  Both fp32.
    """

    importance: float
    A: "Tensor"
    GA: "Tensor"


@dataclass(frozen=True)
class AdapterFactors:
    """Initial values of one adapter: B (m, r), A (r, n) and, if only a core is trained, R (r, r), all fp32.

    ``shift_base``: training starts from the unchanged function, so the base becomes W - s B A.
    """

    B: "Tensor"
    A: "Tensor"
    shift_base: bool = False
    R: "Tensor | None" = None
