"""Second moments of the layers' inputs and output gradients, from the same passes as the mean gradients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from lora_one.distributed import Processes
from lora_one.initialization.activations import activations_of
from lora_one.initialization.backward import GradientReport, backward_passes
from lora_one.initialization.given_batches import one_by_one
from lora_one.initialization.gradients import add_product, refuse_unused, sum_dtype
from lora_one.initialization.holding import Memory, common_room, least_free, packed
from lora_one.linalg import exact_dtype, full_precision
from lora_one.losses import Batch, Reduction, batch_count, evaluating, model_logits
from lora_one.models import weight_shape


@dataclass(frozen=True)
class Moments:
    """What a layer y = W x shows of the examples: its gradient, and second moments over all tokens that it read.

    gradient: G (m, n), of the mean loss, in at least fp32.
    inputs: C (n, n), the mean of x x^T, in fp64 where the device has it; layers with the same input share it.
    outputs: D (m,), the mean of (dL/dy)^2 in the same dtype, L the sum (not the mean) of the losses of all examples, so
    that D does not depend on their number.
    rounding: relative size of the rounding errors of C.
    """

    gradient: Tensor
    inputs: Tensor
    outputs: Tensor
    rounding: float


@full_precision()
def layer_moments(
    model: nn.Module,
    layers: dict[str, nn.Module],
    batches: Sequence[Batch],
    reduction: Reduction,
    consume: Callable[[str, int, Moments | None], None],
    *,
    memory: Memory = "auto",
    checkpointing: bool = False,
) -> GradientReport:
    """Call ``consume(name, owner, moments)`` for each layer on every process; only the owner has the moments.

    Examples are passed one at a time without padding, because a padded position would enter C.

    memory: fast: one pass for all layers. low: a pass for each input, so that the sums of only the layers that share
    this input are in memory. auto: as few passes as fit into the free memory, see
    ``holding.room_beside``. All give the same moments.
    Raises ValueError, on every process: the loss is not finite, or a layer took no part in it (the layer is named).
    """
    examples = list(one_by_one(batches))
    groups = sharing_inputs(model, layers, examples[0])
    dtype = sum_dtype(model, layers)
    losses = sum(batch_count(batch, reduction) for batch in examples)
    sizes = [group_bytes([layers[name] for name in group], dtype) for group in groups]

    def room() -> int:
        activations = partial(activations_of, model, layers, examples, reduction, checkpointing=checkpointing)
        free, _ = least_free(next(iter(layers.values())).weight.device)
        return common_room(sum(sizes), free, activations)

    for chosen in groups_of_passes(sizes, memory, room):
        part = {groups[index][0]: groups[index] for index in chosen}
        own = {name: layers[name] for group in part.values() for name in group}
        sums = MomentSums(set(part), dtype)
        report = backward_passes(model, own, examples, reduction, sums.add, checkpointing=checkpointing)
        refuse_unused(own, sums.tokens.keys())
        for owner, leader in Processes.current().by_turns(list(part)):
            hand_over(part[leader], owner, layers, sums, losses, consume)
    return replace(report, memory="device")


def sharing_inputs(model: nn.Module, layers: dict[str, nn.Module], batch: Batch) -> list[list[str]]:
    """Return the layers in groups that get the same tensor as input, such as the projections q, k and v.

    batch: any example; the layers that it does not use are groups of their own.
    """
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    handles = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0]))
        for name, layer in layers.items()
    ]
    try:
        with evaluating(model), torch.no_grad():
            model_logits(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[tuple[int, ...] | str, list[str]] = {}
    for name, inputs in seen.items():
        groups.setdefault(tuple(map(id, inputs)) or name, []).append(name)
    return list(groups.values())


def group_bytes(layers: Sequence[nn.Module], dtype: torch.dtype) -> int:
    """Return the bytes of the sums of layers with the same input: G of each, in this dtype, and one C in fp64."""
    shapes = [weight_shape(layer) for layer in layers]
    return sum(m * n for m, n in shapes) * dtype.itemsize + 8 * shapes[0][1] ** 2


def groups_of_passes(sizes: Sequence[int], memory: Memory, room: Callable[[], int]) -> list[list[int]]:
    """Return the groups of each pass, by index.

    sizes: bytes of each group.  room: returns the bytes for the groups of a pass; called for memory=auto only.
    """
    if memory == "fast":
        return [list(range(len(sizes)))]
    if memory == "low":
        return [[index] for index in range(len(sizes))]
    return packed(sizes, room())


@dataclass
class MomentSums:
    """Sums over the examples of this process, by layer.

    leaders: the layers whose input is squared, one of each group.  dtype: of the sums of G.
    """

    leaders: set[str]
    dtype: torch.dtype
    gradients: dict[str, Tensor] = field(default_factory=dict)
    squares: dict[str, Tensor] = field(default_factory=dict)  # (m,) of output gradients
    inputs: dict[str, Tensor] = field(default_factory=dict)  # (n, n) of the leaders, see ``add_squares``
    tokens: dict[str, int] = field(default_factory=dict)
    rounding: float = 0.0  # of the products of inputs

    def add(self, name: str, X: Tensor, dY: Tensor) -> None:
        """Add one use of a layer in one example."""
        (tokens, n), m = X.shape, dY.shape[1]
        self.tokens[name] = self.tokens.get(name, 0) + tokens
        G = self.sum(self.gradients, name, (m, n), X.device)
        add_product(G, factor(dY, G.dtype), factor(X, G.dtype))
        squares = self.sum(self.squares, name, (m,), X.device)
        squares += dY.to(squares.dtype).square().sum(dim=0)
        if name in self.leaders:
            C = self.sum(self.inputs, name, (n, n), X.device)
            X = factor(X, C.dtype)
            add_squares(C, X)
            self.rounding = torch.finfo(torch.promote_types(X.dtype, torch.float32)).eps

    def sum(self, sums: dict[str, Tensor], name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Return a sum; before the first example, zeros."""
        if name not in sums:
            dtype = self.dtype if sums is self.gradients else exact_dtype(device)
            sums[name] = torch.zeros(shape, dtype=dtype, device=device)
        return sums[name]

    def take(self, sums: dict[str, Tensor], name: str, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Remove and return a sum; zeros if the layer was used only by other processes."""
        self.sum(sums, name, shape, device)
        return sums.pop(name)


def factor(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the factor of a product that is added to sums of this dtype; unchanged on a GPU, which is slow in fp64.

    C^-1 amplifies rounding errors of C and G. If the sums of G are fp32, fp64 products make it hardly more accurate.
    """
    return values.to(dtype) if values.device.type == "cpu" else values


def add_squares(sums: Tensor, X: Tensor) -> None:
    """Add X^T X to sums (n, n), without the blocks below the diagonal, which saves almost half of the work.

    ``fill_lower`` adds these blocks. X: (tokens, n).
    """
    for start, end in blocks(len(sums)):
        add_product(sums[start:end, start:], X[:, start:end], X[:, start:])


def fill_lower(sums: Tensor) -> None:
    """Fill the blocks below the diagonal, which are those above it transposed."""
    for start, end in blocks(len(sums)):
        sums[start:end, :start] = sums[:start, start:end].T


def blocks(n: int) -> list[tuple[int, int]]:
    """Return begin and end of the blocks of a square matrix: 8, or fewer if they were too small for fast products."""
    size = max(128, -(-n // 8))
    return [(start, min(start + size, n)) for start in range(0, n, size)]


def hand_over(
    group: list[str],
    owner: int,
    layers: dict[str, nn.Module],
    sums: MomentSums,
    losses: int,
    consume: Callable[[str, int, Moments | None], None],
) -> None:
    """Add the sums of all processes for layers with the same input, and pass the moments of each layer on.

    losses: the divisor of the mean loss.
    """
    processes = Processes.current()
    device = layers[group[0]].weight.device
    n = weight_shape(layers[group[0]])[1]
    tokens = {name: round(processes.total(sums.tokens.get(name, 0))) for name in group}
    rounding = max(processes.gathered(sums.rounding))
    C = processes.sum_to(owner, sums.take(sums.inputs, group[0], (n, n), device)).div_(tokens[group[0]])
    fill_lower(C)
    for name in group:
        m, n = weight_shape(layers[name])
        G = processes.sum_to(owner, sums.take(sums.gradients, name, (m, n), device))
        squares = processes.sum_to(owner, sums.take(sums.squares, name, (m,), device))
        mine = processes.rank == owner
        D = squares.to(C.dtype) * (losses**2 / tokens[name])
        consume(name, owner, Moments(G, C, D, rounding) if mine else None)
