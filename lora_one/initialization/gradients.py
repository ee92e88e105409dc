"""The mean gradient of the loss in the target layers' weights, without asking any weight for a gradient.

For y = x W^T the gradient is G = dY^T X, summed over positions, so a layer's input and the gradient of its
output are enough: weights stay frozen, and may be quantised or sharded.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor, nn

from lora_one.distributed import Processes
from lora_one.initialization.backward import GradientReport, backward_passes
from lora_one.initialization.holding import Place
from lora_one.losses import Batch, Reduction
from lora_one.models import weight_shape

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
    """Hand G (m, n) of each layer to ``consume(name, G)`` and free it; fp32 (fp64 for an fp64 model).

    G is the gradient of the mean loss over all batches (``reduction``: mean over examples of their mean-token
    losses, or over tokens), dropout off, so it depends on no batch size, no padding and no number of processes.
    dY^T X and the sum over batches are taken in fp32 whatever the model's dtype (see ``product``), the sums of small
    models in fp64: their order, hence the number of processes, then leaves no trace.

    place: where G waits, see ``holding.Holding``; "layer" is for a single batch, and "sketch" is not for this function.
    checkpointing: keep only the inputs of the model's blocks and compute the rest again in the backward pass.
    Several processes share the batches, or with "layer" all take the same one; each layer's gradient is sent to one of
    them, in round-robin order.

    Raises ValueError, on every process: the loss is not finite, a layer took no part in it (named), or place="layer"
    with several batches.
    """
    processes = Processes.current()
    if place == "layer" and len(batches) > 1:
        raise ValueError(f'place="layer" is for one batch, got {len(batches)}')
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
        for name, layer in layers.items():
            G = processes.sum_to(owners[name], gradients.take(name, layer)).to(wide_dtype(model))
            if processes.rank == owners[name]:
                consume(name, G)
            del G
    return report


@dataclass
class BatchSums:
    """Sums over the batches of this process of every layer's G, on the device or on the CPU.

    calls: uses of each layer that the backward pass has not reached yet.  seen: layers that took part.
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
        wide = torch.promote_types(dY.dtype, torch.float32)
        if name in self.totals and self.place != "cpu" and self.totals[name].dtype == wide:
            product(dY, X, onto=self.totals[name])
            return
        G = product(dY, X)
        G = G.to("cpu" if self.place == "cpu" else G.device, self.dtype)
        self.totals[name] = self.totals[name].add_(G) if name in self.totals else G

    def take(self, name: str, layer: nn.Module) -> Tensor:
        """Remove and return a layer's sum; zeros where the layer took part on other processes only."""
        if name in self.totals:
            return self.totals.pop(name)
        device = "cpu" if self.place == "cpu" else layer.weight.device
        return torch.zeros(weight_shape(layer), dtype=self.dtype, device=device)


@dataclass
class LayerSums:
    """G of one batch, handed over within the backward pass, so at most one gradient is in memory at a time.

    owners: rank that consumes each layer's G.  calls, seen: as of ``BatchSums``.
    """

    owners: dict[str, int]
    rank: int
    consume: Callable[[str, Tensor], None]
    totals: dict[str, Tensor] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    seen: set[str] = field(default_factory=set)

    def add(self, name: str, X: Tensor, dY: Tensor) -> None:
        """Add dY^T X to a layer's G; a layer used several times is complete after its last use."""
        self.calls[name] -= 1
        self.seen.add(name)
        if self.owners[name] != self.rank:
            return
        if name in self.totals and self.totals[name].dtype == torch.promote_types(dY.dtype, torch.float32):
            product(dY, X, onto=self.totals[name])
        else:
            G = product(dY, X)
            self.totals[name] = self.totals[name].add_(G) if name in self.totals else G
        if self.calls[name] == 0:
            self.consume(name, self.totals.pop(name))


@contextmanager
def without_autocast() -> Iterator[None]:
    """Switch off torch.autocast within the block: a start is the same inside and outside of the caller's region."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    with ExitStack() as stack:
        for device in ("cpu", *([accelerator.type] if accelerator else [])):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def product(dY: Tensor, X: Tensor, onto: Tensor | None = None) -> Tensor:
    """Return dY^T X (m, n) in at least fp32, added to ``onto`` in place if that is passed.

    A GPU multiplies 16-bit factors as they are into fp32 sums, many times faster than fp32 factors and as exactly: the
    product of two 16-bit numbers is an fp32 number.
    """
    wide = torch.promote_types(dY.dtype, torch.float32)
    if dY.dtype == X.dtype and dY.dtype in (torch.bfloat16, torch.float16) and sums_in_fp32(X.device):
        if onto is None:
            return torch.mm(dY.T, X, out_dtype=wide)
        return torch.addmm(onto, dY.T, X, out_dtype=wide, out=onto)
    return dY.to(wide).T @ X.to(wide) if onto is None else onto.addmm_(dY.to(wide).T, X.to(wide))


@cache
def sums_in_fp32(device: torch.device) -> bool:
    """Return whether the device multiplies 16-bit matrices into fp32; tried once on small ones."""
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


def refuse_unused(layers: dict[str, nn.Module], used: AbstractSet[str]) -> None:
    """Raise ValueError, on every process, when no process used a layer (an unused expert, for example)."""
    somewhere = set().union(*Processes.current().gathered(set(used)))
    unused = [name for name in layers if name not in somewhere]
    if unused:
        more = f" (nor did {len(unused) - 1} more)" if len(unused) > 1 else ""
        raise ValueError(
            f"layer {unused[0]} got no gradient{more}: it takes no part in the loss on the initialisation examples; "
            "take more of them (init.iters), or leave it out of peft.lora_target_modules"
        )


def wide_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of gradients: fp32, or fp64 for an fp64 model."""
    return torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32


def sum_dtype(model: nn.Module, layers: dict[str, nn.Module]) -> torch.dtype:
    """Return the dtype of sums over batches: fp64 where all sums together are small, on a device that has it."""
    entries = sum(m * n for m, n in map(weight_shape, layers.values()))
    small = 8 * entries <= SMALL and next(model.parameters()).device.type != "mps"
    return torch.float64 if small else wide_dtype(model)
