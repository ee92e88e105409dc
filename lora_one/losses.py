"""The loss of every kind of model, one definition for training, validation and the one-step gradient."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

IGNORED = -100  # label of prompt and padding
Reduction = Literal["example", "token"]
Batch = dict[str, Tensor]


def targets(batch: Batch) -> Tensor:
    """(batch, length): what the logits at each place must predict, int64, IGNORED where nothing counts.

    A batch says by its form which kind of model it is for. A causal model's logits at t predict the label at t + 1; an
    encoder-decoder's, whose batch holds ``decoder_input_ids``, the label at t; for a classification head ``labels`` is
    (batch,), one class each, and the length here is 1.
    """
    labels = batch["labels"]
    if labels.dim() == 1:
        return labels[:, None]
    return labels if "decoder_input_ids" in batch else pad(labels[:, 1:], (0, 1), value=IGNORED)


@dataclass(frozen=True)
class Counted:
    """Where in a batch something is to be predicted, and how much it weighs; found where the labels are.

    Found on the CPU before the batch goes to the device, it spares the host from waiting for the device. It moves with
    the batch like a tensor.

    rows, columns: (n,) int64, places in (batch, length).  wanted: (n,) int64, what is to be predicted there.
    sizes: (n,) int64, tokens that count in the same example; None where every token weighs the same.
    length: of the batch's rows.  first: the first column; 0 if nothing counts.
    count: what the sum of losses is divided by for the mean: tokens that count, or examples that have one.
    """

    rows: Tensor
    columns: Tensor
    wanted: Tensor
    sizes: Tensor | None
    length: int
    first: int
    count: int

    def to(self, device: Any, non_blocking: bool = False) -> "Counted":
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Counted":
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Counted":
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: change(tensor) for name, tensor in tensors.items()})


def counted_of(wanted: Tensor, reduction: Reduction, position_ids: Tensor | None = None) -> Counted:
    """The places that count in ``targets`` of a batch.

    position_ids: only where a row holds several examples (batch, length), 0 where one begins.
    """
    rows, columns = (wanted != IGNORED).nonzero(as_tuple=True)
    sizes, count = None, len(rows)
    if reduction == "example":
        example = examples_of(wanted, position_ids)[rows, columns]
        tokens = example.bincount()
        sizes, count = tokens[example], int(tokens.count_nonzero())
    first = int(columns.min()) if len(columns) else 0
    return Counted(rows, columns, wanted[rows, columns], sizes, wanted.shape[1], first, count)


def loss_sum(logits: Tensor, wanted: Tensor, reduction: Reduction, position_ids: Tensor | None = None) -> Tensor:
    """Sum of cross-entropies: over tokens, or over examples of each example's mean over its tokens.

    logits: as ``loss_at`` takes them.  wanted: ``targets`` of the batch.  position_ids: as in ``counted_of``.
    Divide by ``loss_count`` for the mean.
    """
    return loss_at(logits, counted_of(wanted, reduction, position_ids).to(logits.device))


def loss_at(logits: Tensor, counted: Counted) -> Tensor:
    """The same at places that are known, on the device of the logits; the host does not wait for the device.

    logits: (batch, length, vocabulary), or (batch, classes) of a classification head, or those at the last places only,
    if nothing counts before them.  Computed in at least fp32, for the counted tokens only.
    """
    logits = logits[:, None] if logits.dim() == 2 else logits
    kept = logits.shape[1]
    places = counted.rows * kept + counted.columns - (counted.length - kept)
    chosen = logits.flatten(0, 1).index_select(0, places)
    chosen = chosen if chosen.dtype == torch.float64 else chosen.float()
    losses = cross_entropy(chosen, counted.wanted, reduction="none")
    return (losses if counted.sizes is None else losses / counted.sizes).sum()


def loss_count(wanted: Tensor, reduction: Reduction, position_ids: Tensor | None = None) -> int:
    """What ``loss_sum`` is divided by for the mean: tokens that count, or examples that have one."""
    return counted_of(wanted, reduction, position_ids).count


def examples_of(wanted: Tensor, position_ids: Tensor | None) -> Tensor:
    """Which example each token is of, counted through the batch (batch, length): a row's, or by where they begin."""
    starts = torch.zeros_like(wanted)
    starts[:, 0] = 1
    if position_ids is not None:
        starts = position_ids.eq(0).long()
    return starts.flatten().cumsum(0).view_as(wanted) - 1


def model_logits(model: nn.Module, batch: Batch, **options: Any) -> Tensor:
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
    return model(**inputs, **options, use_cache=False).logits


def answer_logits(model: nn.Module, batch: Batch, counted: Counted | None = None) -> Tensor:
    """The same from the first place on at which something counts, as ``loss_sum`` takes them.

    Prompts need none, and for vocabularies of 100,000 words they are much of the memory and of the work.
    """
    return model_logits(model, batch, **few_logits(model, batch, counted))


def batch_loss(model: nn.Module, batch: Batch, reduction: Reduction) -> tuple[Tensor, int, Tensor]:
    """The sum of a batch's losses, what it is divided by for the mean, and the ``answer_logits``.

    The places that count are found once, where the labels are.
    """
    counted = counted_of(targets(batch), reduction)
    logits = answer_logits(model, batch, counted)
    return loss_at(logits, counted.to(logits.device)), counted.count, logits


def few_logits(model: nn.Module, batch: Batch, counted: Counted | None = None) -> dict[str, int]:
    """What tells a causal model to leave out the logits before the first that counts; nothing for another model.

    counted: of this batch, if it is known.
    """
    if batch["labels"].dim() == 1 or "decoder_input_ids" in batch or not keeps_logits(model):
        return {}
    counted = counted or counted_of(targets(batch), "token")
    return {"logits_to_keep": counted.length - counted.first}


def keeps_logits(model: nn.Module) -> bool:
    """Whether a model computes only the logits that it is asked for, inside an adapter too."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in parameters_of(type(inner))


@cache
def parameters_of(kind: type[nn.Module]) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off in every part of the model; afterwards each is as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[Batch], reduction: Reduction) -> float:
    """Mean loss over batches, dropout off; neither batch size nor padding changes it."""
    total, count = 0.0, 0
    with evaluating(model):
        for batch in batches:
            loss, examples, _ = batch_loss(model, batch, reduction)
            total += float(loss)
            count += examples
    return total / count
