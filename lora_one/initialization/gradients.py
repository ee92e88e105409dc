"""The mean gradient of the loss with respect to the target layers' weights, with every weight frozen.

For y = x W^T the gradient is G = dY^T X, summed over positions. It needs only the layer's input and the gradient of its
output, so the weights can be quantised or sharded.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor, nn

from lora_one.distributed import Processes
from lora_one.initialization.backward import GradientReport, backward_passes
from lora_one.initialization.holding import Place
from lora_one.losses import Batch, Reduction
from lora_one.models import weight_shape
from lora_one.progress import progress

SMALL = 2**28  # bytes of fp64 sums of all layers together


def mean_gradients(
    model: nn.Module,
    layers: dict[str, nn.Module],
    batches: Sequence[Batch],
    reduction: Reduction,
    consume: Callable[[str, Tensor], None],
    *,
    place: Place = "device",
    checkpointing: bool = False,
) -> GradientReport:
    """Call ``consume(name, G)`` with the gradient G (m, n) of each layer, then free G; fp32, fp64 for an fp64 model.

    G is the gradient of the mean loss over all batches (``reduction``: mean over examples of their mean token losses,
    or over tokens) without dropout, so it does not depend on batch size, padding or number of processes. dY^T X and the
    sum over batches are computed in at least fp32 for every dtype of the model (see ``product``). Sums of small models
    are in fp64, so that their order, which depends on the number of processes, makes no difference.

    place: where G is stored, see ``holding.Holding``; "layer" needs a single batch, and "sketch" is not valid here.
    checkpointing: store only the inputs of the model's blocks and recompute the rest in the backward pass.
    Several processes share the batches; with "layer", all use the same batch. Each layer's gradient is sent to one
    process, in round-robin order.

    Raises ValueError, on every process: the loss is not finite, a layer took no part in it (the layer is named), or
    place="layer" with several batches.
    """
    processes = Processes.current()
    if place == "layer" and len(batches) > 1:
        raise ValueError(f'place="layer" needs exactly one batch, got {len(batches)}')
    owners = {name: owner for owner, name in processes.by_turns(list(layers))}
    sums = sum_dtype(model, layers) if len(batches) > 1 else wide_dtype(model)
    gradients = LayerSums(owners, processes.rank, consume) if place == "layer" else BatchSums(place, sums)
    among = Processes() if place == "layer" else processes
    calls = gradients.calls
    report = backward_passes(
        model, layers, batches, reduction, gradients.add, calls, checkpointing=checkpointing, among=among
    )
    refuse_unused(layers, gradients.seen)
    if isinstance(gradients, BatchSums):
        hand_out(gradients, layers, wide_dtype(model), consume)
    return report


def hand_out(
    gradients: "BatchSums", layers: dict[str, nn.Module], dtype: torch.dtype, consume: Callable[[str, Tensor], None]
) -> None:
    """Sum the gradients of all processes layer by layer, and call ``consume`` on each layer's owner.

    One layer for each process is summed before all consume theirs at the same time. G is consumed on the device of the
    layer, also where it was stored on the CPU.
    """
    processes = Processes.current()
    turns = list(processes.by_turns(list(layers)))
    with progress("low-rank steps", len(turns), "layers") as shown:
        for start in range(0, len(turns), processes.count):
            together, mine = turns[start : start + processes.count], []
            for owner, name in together:
                G = processes.sum_to(owner, gradients.take(name, layers[name]).to(layers[name].weight.device))
                if processes.rank == owner:
                    mine.append((name, G))
                del G
            if mine:
                name, G = mine.pop()
                consume(name, G.to(dtype))
                del G
            shown.advance(len(together))


@dataclass
class BatchSums:
    """Sums, over the batches of this process, of every layer's G, on the device or on the CPU.

    calls: uses of each layer whose backward pass is still to come.  seen: layers that took part in the loss.
    """

    place: Place
    dtype: torch.dtype
    totals: dict[str, Tensor] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)

    @property
    def seen(self) -> AbstractSet[str]:
        return self.totals.keys()

    def add(self, name: str, X: Tensor, dY: Tensor) -> None:
        """Add dY^T X to a layer's sum."""
        self.calls[name] -= 1
        if name in self.totals and self.place != "cpu":
            add_product(self.totals[name], dY, X)
            return
        G = product(dY, X)
        G = G.to("cpu" if self.place == "cpu" else G.device, self.dtype)
        self.totals[name] = self.totals[name].add_(G) if name in self.totals else G

    def take(self, name: str, layer: nn.Module) -> Tensor:
        """Remove and return a layer's sum; zeros if the layer was used only by other processes."""
        if name in self.totals:
            return self.totals.pop(name)
        device = "cpu" if self.place == "cpu" else layer.weight.device
        return torch.zeros(weight_shape(layer), dtype=self.dtype, device=device)


@dataclass
class LayerSums:
    """Gradients of one batch, consumed during the backward pass, so at most one gradient is in memory at a time.

    owners: rank that consumes each layer's G.  calls, seen: see ``BatchSums``.
    """

    owners: dict[str, int]
    rank: int
    consume: Callable[[str, Tensor], None]
    totals: dict[str, Tensor] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    seen: set[str] = field(default_factory=set)

    def add(self, name: str, X: Tensor, dY: Tensor) -> None:
        """Add dY^T X to a layer's G, and consume G after the last use of the layer."""
        self.calls[name] -= 1
        self.seen.add(name)
        if self.owners[name] != self.rank:
            return
        if name in self.totals:
            add_product(self.totals[name], dY, X)
        else:
            self.totals[name] = product(dY, X)
        if self.calls[name] == 0:
            self.consume(name, self.totals.pop(name))


def product(dY: Tensor, X: Tensor, onto: Tensor | None = None) -> Tensor:
    """Return dY^T X (m, n) in at least fp32; if ``onto`` is passed, the product is added to it in place.

    A GPU multiplies 16-bit factors into fp32 sums many times faster than fp32 factors, and as accurately, because the
    product of two 16-bit numbers is exact in fp32.
    """
    wide = torch.promote_types(dY.dtype, torch.float32)
    if dY.dtype == X.dtype and dY.dtype in (torch.bfloat16, torch.float16) and sums_in_fp32(X.device):
        if onto is None:
            return torch.mm(dY.T, X, out_dtype=wide)
        return torch.addmm(onto, dY.T, X, out_dtype=wide, out=onto)
    return dY.to(wide).T @ X.to(wide) if onto is None else onto.addmm_(dY.to(wide).T, X.to(wide))


def add_product(sums: Tensor, dY: Tensor, X: Tensor) -> None:
    """Add dY^T X to sums (m, n) of at least fp32, in place; the product is in the wider dtype of its factors."""
    if sums.dtype == torch.promote_types(dY.dtype, torch.float32):
        product(dY, X, onto=sums)
    else:
        sums += product(dY, X)


@cache
def sums_in_fp32(device: torch.device) -> bool:
    """Return whether the device can multiply 16-bit matrices into fp32 sums; tested once with small matrices."""
    if device.type != "cuda":
        return False
    ones = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    total = torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
        total += torch.mm(ones, ones, out_dtype=torch.float32)
    except (RuntimeError, TypeError):  # NotImplementedError is a RuntimeError
        return False
    return bool((total == 33).all())


def zero_gradient(name: str) -> ValueError:
    """Return the error for a layer whose gradient is zero."""
    return ValueError(
        f"the gradient of layer {name} is zero, so it has no leading directions: use more examples (init.iters), or "
        "remove the layer from peft.lora_target_modules"
    )


def refuse_unused(layers: dict[str, nn.Module], used: AbstractSet[str]) -> None:
    """Raise ValueError, on every process, if no process used a layer, such as an unused expert."""
    somewhere = set().union(*Processes.current().gathered(set(used)))
    unused = [name for name in layers if name not in somewhere]
    if unused:
        more = f" (and {len(unused) - 1} more)" if len(unused) > 1 else ""
        raise ValueError(
            f"layer {unused[0]}{more} got no gradient, because the loss on the initialisation examples does not depend "
            "on it: use more examples (init.iters), or remove it from peft.lora_target_modules"
        )


def wide_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of gradients: fp32, or fp64 for an fp64 model."""
    return torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32


def sum_dtype(model: nn.Module, layers: dict[str, nn.Module]) -> torch.dtype:
    """Return the dtype of sums over batches: fp64 if all sums together are small and the device supports it."""
    entries = sum(m * n for m, n in map(weight_shape, layers.values()))
    small = 8 * entries <= SMALL and next(model.parameters()).device.type != "mps"
    return torch.float64 if small else wide_dtype(model)
