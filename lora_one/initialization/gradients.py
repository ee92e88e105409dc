"""The mean gradient of the loss in the target layers' weights, without asking any weight for a gradient.

For y = x W^T the gradient is G = dY^T X, summed over positions, so a layer's input and the gradient of its
output are enough: weights stay frozen, and may be quantised or sharded.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_one.distributed import Processes
from lora_one.losses import Batch, Reduction, batch_loss, evaluating, loss_count, targets
from lora_one.models import weight_shape

SMALL = 2**28  # bytes of fp64 sums of all layers together
Receive = Callable[[str, Tensor, Tensor], None]  # (layer, X (tokens, n), dY (tokens, m))


@dataclass(frozen=True)
class GradientReport:
    """Examples and tokens (that count in the loss) of a mean gradient, and the mean loss on them.

    memory: where the gradients were held, see ``steps.Holding``; None where no gradient was taken.
    """

    examples: int
    tokens: int
    loss: float
    memory: str | None = None


def mean_gradients(
    model: nn.Module,
    layers: dict[str, nn.Module],
    batches: Sequence[Batch],
    reduction: Reduction,
    consume: Callable[[str, Tensor], None],
    *,
    hold: str = "device",
    checkpointing: bool = False,
) -> GradientReport:
    """Hand G (m, n) of each layer to ``consume(name, G)`` and free it; fp32 (fp64 for an fp64 model).

    G is the gradient of the mean loss over all batches (``reduction``: mean over examples of their mean-token
    losses, or over tokens), dropout off, so it depends on no batch size, no padding and no number of processes.
    dY^T X and the sum over batches are taken in fp32 whatever the model's dtype (see ``product``), the sums of small
    models in fp64: their order, hence the number of processes, then leaves no trace.

    hold: "device" or "cpu" keeps every layer's G there until the last batch; "layer" hands a layer's G over
    inside the one backward pass, so that no two are held (for a single batch).
    checkpointing: keep only the inputs of the model's blocks and compute the rest again in the backward pass.
    On several processes each takes its share of the batches, or all the same one; a layer's G reaches one of them, by
    turns.

    Raises ValueError, on every process: the loss is not finite, a layer took no part in it (named), or hold="layer"
    with several batches.
    """
    processes = Processes.current()
    if hold == "layer" and len(batches) > 1:
        raise ValueError(f'hold="layer" is for one batch, got {len(batches)}')
    owners = {name: owner for owner, name in processes.by_turns(list(layers))}
    sums = sum_dtype(model, layers) if len(batches) > 1 else wide_dtype(model)
    totals: dict[str, Tensor] = {}
    handed: set[str] = set()
    calls: Counter[str] = Counter()

    def add(name: str, X: Tensor, dY: Tensor) -> None:
        calls[name] -= 1
        if hold == "layer":
            handed.add(name)
            if owners[name] != processes.rank:
                return
        wide = torch.promote_types(dY.dtype, torch.float32)
        if name in totals and hold != "cpu" and totals[name].dtype == wide:
            product(dY, X, onto=totals[name])
        else:
            G = product(dY, X)
            G = G.to("cpu" if hold == "cpu" else G.device, G.dtype if hold == "layer" else sums)
            totals[name] = totals[name].add_(G) if name in totals else G
        if hold == "layer" and calls[name] == 0:  # a layer used twice is complete after its last use
            consume(name, totals.pop(name))

    among = Processes() if hold == "layer" else processes
    report = backward_passes(model, layers, batches, reduction, add, calls, checkpointing=checkpointing, among=among)
    refuse_unused(layers, handed | totals.keys())
    for name in (name for name in layers if name not in handed):
        owner = owners[name]
        if name not in totals:  # it took part on other processes only
            where = "cpu" if hold == "cpu" else layers[name].weight.device
            totals[name] = torch.zeros(weight_shape(layers[name]), dtype=sums, device=where)
        G = processes.sum_to(owner, totals.pop(name)).to(wide_dtype(model))
        if processes.rank == owner:
            consume(name, G)
        del G
    return report


@contextmanager
def without_autocast() -> Iterator[None]:
    """Switch the caller's torch.autocast off: a start is the same inside and outside of such a region."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    with ExitStack() as stack:
        for device in ("cpu", *([accelerator.type] if accelerator else [])):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def product(dY: Tensor, X: Tensor, onto: Tensor | None = None) -> Tensor:
    """dY^T X (m, n) in at least fp32, added to ``onto`` in place where that is given.

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
    """Whether the device takes 16-bit matrices and gives their product in fp32; tried once on small ones."""
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
    """Raises ValueError, on every process: a layer is among the ``used`` ones of none (an unused expert, say)."""
    somewhere = set().union(*Processes.current().gathered(set(used)))
    unused = [name for name in layers if name not in somewhere]
    if unused:
        more = f" (nor did {len(unused) - 1} more)" if len(unused) > 1 else ""
        raise ValueError(
            f"layer {unused[0]} got no gradient{more}: it takes no part in the loss on the initialisation examples; "
            "take more of them (init.iters), or leave it out of peft.lora_target_modules"
        )


def wide_dtype(model: nn.Module) -> torch.dtype:
    """What gradients are taken and handed over in: fp32, or fp64 for an fp64 model."""
    return torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32


def sum_dtype(model: nn.Module, layers: dict[str, nn.Module]) -> torch.dtype:
    """What they are summed in: fp64 where all sums together are small, on a device that has it."""
    entries = sum(m * n for m, n in map(weight_shape, layers.values()))
    small = 8 * entries <= SMALL and next(model.parameters()).device.type != "mps"
    return torch.float64 if small else wide_dtype(model)


def backward_passes(
    model: nn.Module,
    layers: dict[str, nn.Module],
    batches: Sequence[Batch],
    reduction: Reduction,
    receive: Receive,
    calls: Counter[str] | None = None,
    *,
    checkpointing: bool = False,
    among: Processes | None = None,
) -> GradientReport:
    """Forward and backward over this process's share of the batches; ``receive`` gets each layer's X and dY.

    The loss is the mean over all batches of all processes, so dY carries its share of that mean. ``calls`` counts
    a layer's uses in a forward pass before its backward pass begins. among: who share the batches (None: all there
    are).
    Raises ValueError, on every process: the loss is not finite.
    """
    processes = among or Processes.current()
    count = sum(loss_count(targets(batch), reduction) for batch in batches)
    calls = Counter() if calls is None else calls
    loss = 0.0
    with (
        evaluating(model),
        _tapped(layers, receive, calls) as forward,
        gradients_from_the_embeddings(model),
        _checkpointed(model, checkpointing),
    ):
        for batch, weight in processes.share(batches):
            with torch.enable_grad(), forward():
                share = batch_loss(model, batch, reduction)[0] * (weight / count)
            loss += share.item()
            if processes.count == 1 and not math.isfinite(loss):
                break
            share.backward()  # of several processes none stops alone: the others would wait for it
    loss = processes.total(loss)
    if not math.isfinite(loss):
        raise ValueError(f"the loss on the initialisation examples is {loss}")
    examples = sum(len(batch["labels"]) for batch in batches)
    tokens = sum(loss_count(targets(batch), "token") for batch in batches)
    return GradientReport(examples, tokens, loss)


class _Tap(torch.autograd.Function):
    """The identity on a layer's output; its backward pass hands (X, dY) over.

    X is saved as autograd saves it, so activation checkpointing drops and recomputes it like any activation.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, X: Tensor, hand_over: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(X)
        ctx.hand_over = hand_over
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor, None, None]:
        (X,) = ctx.saved_tensors
        ctx.hand_over(X.reshape(-1, X.shape[-1]), dY.reshape(-1, dY.shape[-1]))
        return dY, None, None


@contextmanager
def _tapped(layers: dict[str, nn.Module], receive: Receive, calls: Counter[str]) -> Iterator[Callable[[], Any]]:
    """While open, backward passes hand X and dY of each layer to ``receive``.

    Yields a context for the forward pass: uses are counted in it, and not when checkpointing repeats them later.
    """
    counting = False

    @contextmanager
    def forward() -> Iterator[None]:
        nonlocal counting
        counting = True
        try:
            yield
        finally:
            counting = False

    def watch(name: str, _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if counting:
            calls[name] += 1
        if not output.requires_grad:
            return None
        return _Tap.apply(output, inputs[0].detach(), partial(receive, name))

    handles = [layer.register_forward_hook(partial(watch, name)) for name, layer in layers.items()]
    try:
        yield forward
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def gradients_from_the_embeddings(model: nn.Module) -> Iterator[None]:
    """With every weight frozen, autograd starts at the embeddings' output.

    An encoder and its decoder look words up in two modules that share a weight.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)

    def start(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor | None:
        return output.requires_grad_(True) if torch.is_grad_enabled() else None

    words = model.get_input_embeddings()
    alike = [module for module in model.modules() if isinstance(module, nn.Embedding) and module.weight is words.weight]
    handles = [module.register_forward_hook(start) for module in {words, *alike}]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def _checkpointed(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Checkpoint each of the model's blocks; transformers' own switch would turn dropout on with it."""
    blocks = blocks_of(model) if wanted else []
    own = [vars(block).get("forward") for block in blocks]  # accelerate's placement gives an instance its own
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block, before in zip(blocks, own, strict=True):
            if before is None:
                del block.forward  # the class's is behind it
            else:
                block.forward = before


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks whose inside a checkpointed forward pass computes again."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
