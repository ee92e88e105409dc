"""GoRA (arXiv:2502.12171): ranks by the importance of each weight, and B from the gradient by A's pseudo-inverse."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import init as fill

from lora_one.config.methods.gradient import GoraSettings
from lora_one.types import AdapterFactors, LayerView, Measured

HALVINGS = 200  # of the interval that contains the common factor of the ranks; fewer than 100 exhaust fp64


def measure(settings: GoraSettings, layer: LayerView, G: Tensor) -> Measured:
    """Return the importance mean |W * G| (by entry), A Kaiming uniform in +-1/sqrt(n), and G A^T.

    A has as many rows as the largest rank has. They are independent, so its first r rows are a draw for rank r, and G
    is not needed again when the ranks are known.  Raises ValueError: a value is not finite.
    """
    importance = float((layer.weight().to(G) * G).abs().mean())
    if not math.isfinite(importance):
        raise ValueError(f"the gradient or the weight of layer {layer.name} contains values that are not finite")
    R = min(settings.max_rank, *layer.shape)
    A = fill.kaiming_uniform_(torch.empty(R, layer.shape[1]), a=math.sqrt(5), generator=layer.generator)
    return Measured(importance, A, (G @ A.to(G).T).float())


def factors(settings: GoraSettings, layer: LayerView, found: Measured) -> AdapterFactors:
    """Return A and B = -(gamma / s) (n / r)^1/2 G A^T (A A^T)^-1; W is not changed.

    gamma is ``init.step_size``. With rsLoRA, s = alpha / r^1/2 and B = -(gamma n^1/2 / alpha) G A^T (A A^T)^-1, the
    published formula. For every s, s B A = -gamma (n / r)^1/2 G P with the projection P on the rows of A, and
    E ||s B A||_F is about gamma ||G||_F.

    B (m, r) and A (r, n) are fp32.
    """
    r = layer.rank
    A, GA = found.A[:r].to(found.GA), found.GA[:, :r]
    size = settings.step_size / layer.scaling * math.sqrt(layer.shape[1] / r)
    gram = A.cpu().double() @ A.cpu().double().T  # (r, r)
    B = -size * torch.linalg.solve(gram, GA.cpu().double().T).T
    return AdapterFactors(B.to(GA), A)


def ranks(
    settings: GoraSettings, importances: Mapping[str, float], shapes: Mapping[str, tuple[int, int]], reference: int
) -> dict[str, int]:
    """Return the rank of each layer, in [min_rank, max_rank], within the parameters of rank ``reference`` everywhere.

    The budget is reference x sum (m + n), the trained parameters of LoRA with this rank, so the two are compared with
    equally many. A layer's share of the parameters is proportional to its importance: r_i = c I_i / (m_i + n_i),
    clipped. c is the number for which the real r_i use the whole budget, also after clipping. They are rounded down,
    and the parameters that are left go to the layers with the largest remainders. So the budget is never exceeded, is
    exact if all layers have the same m + n, and otherwise is missed by less than one rank of the smallest layer
    that is not at its maximum.

    The paper weights a layer by (m + n)^1/2 instead of m + n; the authors' code by m + n, as here.
    Raises ValueError: every importance is zero.
    """
    if not any(importances.values()):
        raise ValueError("the gradients of all layers are zero: use more examples (init.iters)")
    cost = {name: sum(shape) for name, shape in shapes.items()}
    highest = {name: min(settings.max_rank, *shape) for name, shape in shapes.items()}
    budget = reference * sum(cost.values())

    def real_ranks(c: float) -> dict[str, float]:
        wanted = {name: c * value / cost[name] for name, value in importances.items()}
        return {name: min(max(rank, settings.min_rank), highest[name]) for name, rank in wanted.items()}

    low, high = 0.0, max(highest[name] * cost[name] / value for name, value in importances.items() if value > 0)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        used = sum(rank * cost[name] for name, rank in real_ranks(middle).items())
        low, high = (low, middle) if used > budget else (middle, high)
    wanted = real_ranks(low)
    found = {name: int(rank) for name, rank in wanted.items()}
    left = budget - sum(rank * cost[name] for name, rank in found.items())
    while open_layers := [name for name in found if found[name] < highest[name] and cost[name] <= left]:
        name = max(open_layers, key=lambda name: wanted[name] - found[name])  # the first of equal ones
        found[name] += 1
        left -= cost[name]
    return found
