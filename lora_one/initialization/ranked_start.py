"""Starts of methods that choose the rank of each layer: from the bare base, before PEFT wraps it."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from lora_one.adaptation.layers import bare_view
from lora_one.distributed import Processes
from lora_one.initialization.activations import activations_of
from lora_one.initialization.gradients import mean_gradients
from lora_one.initialization.holding import grouped, how_to_hold
from lora_one.initialization.methods import Method
from lora_one.initialization.solution import Probe, Solution
from lora_one.linalg import full_precision
from lora_one.models import weight_shape
from lora_one.types import LayerView, Measured


@full_precision()
def solve_with_ranks(
    base: nn.Module,
    layers: dict[str, nn.Module],
    method: Method,
    probe: Probe,
    seed: int,
    rank: int,
    scaling: Callable[[str, int], float],
) -> Solution:
    """Return factors of different ranks, the same on every process; the base is frozen, and otherwise unchanged.

    One pass over the examples (one for each group of layers whose gradients fit into memory). Of each layer's mean
    gradient G only what ``method.measure`` returns is kept.

    rank: that all layers would have without the choice; it decides the budget.  scaling: returns s of a layer, by its
    name and its rank.
    Raises ValueError, on every process: see ``mean_gradients``; or a gradient is not finite.
    """
    found: dict[str, Measured] = {}
    refused: list[str] = []

    def view(name: str, rank: int) -> LayerView:
        return bare_view(name, layers[name], rank, scaling(name, rank), seed)

    def measure(name: str, G: Tensor) -> None:
        try:
            found[name] = method.measure(view(name, rank), G)
        except ValueError as error:
            refused.append(str(error))

    base.requires_grad_(False)
    activations = partial(
        activations_of, base, layers, probe.batches, probe.reduction, checkpointing=probe.settings.checkpointing
    )
    holding = how_to_hold(layers, probe.batches, probe.settings.memory, whole=True, activations=activations)
    for group in grouped(layers, holding.room):
        report = mean_gradients(
            base,
            group,
            probe.batches,
            probe.reduction,
            measure,
            place=holding.place,
            checkpointing=probe.settings.checkpointing,
        )
    shapes = {name: weight_shape(layer) for name, layer in layers.items()}
    found = shared(found, refused, layers)
    ranks = method.ranks({name: one.importance for name, one in found.items()}, shapes, rank)
    factors, decrease = {}, 0.0
    for name, one in found.items():
        layer = view(name, ranks[name])
        factors[name] = method.factors(layer, one)
        # <G, s B A> = s <G A^T, B>
        decrease -= layer.scaling * float((one.GA[:, : layer.rank] * factors[name].B).sum(dtype=torch.float64))
    return Solution(factors, examples=replace(report, memory=holding.place), predicted_decrease=decrease)


def shared(found: dict[str, Measured], refused: list[str], layers: dict[str, nn.Module]) -> dict[str, Measured]:
    """Return what was measured of every layer, on every process; each layer was measured by one of them.

    refused: errors of this process. Raises ValueError, on every process, with the first error.
    """
    processes = Processes.current()
    for message in chain.from_iterable(processes.gathered(refused)):
        raise ValueError(message)
    if processes.count == 1:
        return {name: found[name] for name in layers}
    sizes: dict[str, tuple[float, int]] = {}
    for part in processes.gathered({name: (one.importance, len(one.A)) for name, one in found.items()}):
        sizes |= part
    everywhere = {}
    for owner, name in processes.by_turns(list(layers)):
        (m, n), (importance, R) = weight_shape(layers[name]), sizes[name]
        device = layers[name].weight.device
        own = found.get(name)
        A = torch.empty(R, n, device=device) if own is None else own.A.to(device)
        GA = torch.empty(m, R, device=device) if own is None else own.GA.to(device)
        A, GA = processes.from_owner(owner, A), processes.from_owner(owner, GA)
        everywhere[name] = Measured(importance, A, GA)
    return everywhere
