"""Backward passes that return each layer's input and the gradient of its output, with every weight frozen."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_one.distributed import Processes
from lora_one.initialization.holding import Place
from lora_one.losses import Batch, Reduction, batch_count, batch_loss, evaluating
from lora_one.progress import progress

Receive = Callable[[str, Tensor, Tensor], None]  # (layer, X (tokens, n), dY (tokens, m))
FP16_HEADROOM = 3  # power of two, at least, by which the gradient of one example's, or token's, loss is larger


@dataclass(frozen=True)
class GradientReport:
    """Number of examples and of tokens, those with a loss, of a mean gradient, and the mean loss on them.

    memory: where the gradients were stored, see ``holding.Holding``; None: no gradient was computed.
    """

    examples: int
    tokens: int
    loss: float
    memory: Place | None = None

    @classmethod
    def of(cls, batches: Sequence[Batch], loss: float) -> "GradientReport":
        """Return the report of a mean loss on these batches. Raises ValueError: it is not finite."""
        if not math.isfinite(loss):
            raise ValueError(f"the loss on the initialisation examples is {loss}")
        examples, tokens = (sum(batch_count(batch, each) for batch in batches) for each in ("example", "token"))
        return cls(examples, tokens, loss)


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
    """Run forward and backward over this process's share of the batches; pass each layer's X and dY to ``receive``.

    The loss is the mean over the batches of all processes, and dY is the gradient of this mean.

    calls: counts the uses of each layer in a forward pass, before its backward pass begins.  among: the processes that
    share the batches; None: all.
    Raises ValueError, on every process: the loss is not finite.
    """
    processes = among or Processes.current()
    count = sum(batch_count(batch, reduction) for batch in batches)
    scale = scale_of_losses(model, count)
    receive = receive if scale == 1 else partial(unscaled, receive, scale)
    taps = Taps(receive, Counter() if calls is None else calls)
    loss = 0.0
    with (
        prepared(model, layers, taps, checkpointing=checkpointing),
        progress("gradient", -(-len(batches) // processes.count), "batches") as shown,
    ):
        for batch, weight in processes.share(batches):
            taps.receive = receive if weight else _ignore  # a batch of another process, repeated without weight
            with torch.enable_grad(), taps.counting():
                share = batch_loss(model, batch, reduction)[0] * (weight / count)
            loss += share.item()
            if processes.count == 1 and not math.isfinite(loss):
                break
            # one of several processes must not stop alone, because the others would wait for it
            share.backward(torch.full_like(share, scale))
            shown.advance()
    return GradientReport.of(batches, processes.total(loss))


def scale_of_losses(model: nn.Module, count: int) -> float:
    """Return a power of two by which the loss is multiplied, so that the gradients of a mean do not underflow in fp16.

    It undoes the division by the number of examples or tokens. fp16 ends at 2^16, so that gradients of up to 2^12 of
    the loss of one of them remain finite.
    """
    in_fp16 = any(parameter.dtype == torch.float16 for parameter in model.parameters())
    return 2.0 ** (math.ceil(math.log2(max(count, 1))) + FP16_HEADROOM) if in_fp16 else 1.0


def unscaled(receive: Receive, scale: float, name: str, X: Tensor, dY: Tensor) -> None:
    """Pass dY without the scale of the loss, in fp32, because fp16 would lose it again; products are then fp32, too."""
    receive(name, X, dY.float() / scale)


def _ignore(_name: str, _X: Tensor, _dY: Tensor) -> None:
    """Receive nothing."""


class _Tap(torch.autograd.Function):
    """The identity on a layer's output; its backward pass calls ``receive`` with X and dY.

    X is saved by autograd, so activation checkpointing frees and recomputes it like any activation. The output shares
    its memory but is no view for autograd, because some models (Falcon) add to it in place; no layer needs it backward.
    anchor: any tensor that needs a gradient, so that the output does, also of a layer that reads a constant, as
    DeBERTa's layers read the embeddings of relative positions.
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, X: Tensor, anchor: Tensor, receive: Callable[[Tensor, Tensor], None]
    ) -> Tensor:
        ctx.save_for_backward(X)
        ctx.receive = receive
        return torch.ops.aten._unsafe_view(output, output.shape)

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor, None, None, None]:
        (X,) = ctx.saved_tensors
        ctx.receive(X.reshape(-1, X.shape[-1]), dY.reshape(-1, dY.shape[-1]))
        return dY, None, None, None


@dataclass
class Taps:
    """Forward hooks that make backward passes call ``receive`` with X and dY of each layer.

    calls: uses of each layer in forward passes within ``counting``, but not those that checkpointing repeats later.
    """

    receive: Receive
    calls: Counter[str]
    is_counting: bool = field(default=False, init=False)
    anchor: Tensor = field(default_factory=lambda: torch.zeros((), requires_grad=True), init=False)

    @contextmanager
    def on(self, layers: dict[str, nn.Module]) -> Iterator[None]:
        """Return a context in which the layers have the hooks."""
        handles = [layer.register_forward_hook(partial(self.after_forward, name)) for name, layer in layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Return a context in which uses are counted: the forward pass without its backward pass."""
        self.is_counting = True
        try:
            yield
        finally:
            self.is_counting = False

    def after_forward(self, name: str, _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """Replace a layer's output by its ``_Tap``; this is a forward hook."""
        if self.is_counting:
            self.calls[name] += 1
        if not torch.is_grad_enabled():  # in the model's own no_grad, or the first pass of its reentrant checkpoints
            return None
        return _Tap.apply(output, inputs[0].detach(), self.anchor, partial(self.receive, name))


@contextmanager
def prepared(model: nn.Module, layers: dict[str, nn.Module], taps: Taps, *, checkpointing: bool) -> Iterator[None]:
    """Return a context in which a pass is as ``backward_passes`` needs it: without dropout, with these hooks."""
    with evaluating(model), taps.on(layers), gradients_from_the_embeddings(model), _checkpointed(model, checkpointing):
        yield


@contextmanager
def gradients_from_the_embeddings(model: nn.Module) -> Iterator[None]:
    """Return a context in which every weight is frozen and gradients are computed back to the embeddings' output.

    An encoder and its decoder may have two embedding modules that share one weight.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    words = model.get_input_embeddings()
    alike = [module for module in model.modules() if isinstance(module, nn.Embedding) and module.weight is words.weight]
    handles = [module.register_forward_hook(_require_gradient) for module in {words, *alike}]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)


def _require_gradient(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor | None:
    """Make autograd compute the gradient of a module's output; this is a forward hook."""
    return output.requires_grad_(True) if torch.is_grad_enabled() else None


@contextmanager
def _checkpointed(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Return a context that checkpoints each block, if wanted; the option of transformers would also enable dropout."""
    blocks = blocks_of(model) if wanted else []
    own = [vars(block).get("forward") for block in blocks]  # set on an instance by accelerate's device placement
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block, before in zip(blocks, own, strict=True):
            if before is None:
                del block.forward  # the method of the class is then used again
            else:
                block.forward = before


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the model's blocks, whose activations checkpointing recomputes in the backward pass."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
