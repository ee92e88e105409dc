"""Backward passes that give each layer's input and the gradient of its output, with every weight frozen."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_one.distributed import Processes
from lora_one.initialization.holding import Place
from lora_one.losses import Batch, Reduction, batch_loss, evaluating, loss_count, targets

Receive = Callable[[str, Tensor, Tensor], None]  # (layer, X (tokens, n), dY (tokens, m))


@dataclass(frozen=True)
class GradientReport:
    """Examples and tokens (that count in the loss) of a mean gradient, and the mean loss on them.

    memory: where the gradients waited, see ``holding.Holding``; None where no gradient was taken.
    """

    examples: int
    tokens: int
    loss: float
    memory: Place | None = None


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
    a layer's uses in a forward pass before its backward pass begins. among: the processes that share the batches (None:
    all).
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
    """Let backward passes within the block hand X and dY of each layer to ``receive``.

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
    """Freeze every weight within the block, and let autograd start at the embeddings' output.

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
                del block.forward  # which uncovers the class's
            else:
                block.forward = before


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks whose inside a checkpointed forward pass computes again."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
