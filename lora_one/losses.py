"""The loss of every kind of model: one definition for training, validation and the one-step gradient."""

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
    """Return what the logits at each position must predict: (batch, length) int64, IGNORED where no loss is computed.

    The kind of model follows from the batch. With 2-d ``labels``, the logits of a causal model at t predict the label
    at t + 1, those of an encoder-decoder model (the batch has ``decoder_input_ids``) the label at t. For a
    classification head ``labels`` is (batch,), one class each, and the returned length is 1.
    """
    labels = batch["labels"]
    if labels.dim() == 1:
        return labels[:, None]
    return labels if "decoder_input_ids" in batch else pad(labels[:, 1:], (0, 1), value=IGNORED)


@dataclass(frozen=True)
class Counted:
    """Positions in a batch that have a loss, with their targets and weights.

    If it is computed on the CPU, before the batch is moved to the device, the host need not wait for the device. It is
    moved with the batch like a tensor.

    rows, columns: (n,) int64, positions in (batch, length).  wanted: (n,) int64, the targets there.
    sizes: (n,) int64, number of counted tokens in the same example; None: every token has weight 1.
    kept: (k,) int64, the columns in which any row has a counted position, ascending; [0] if no position counts.
    of_kept: (n,) int64, the place in ``kept`` of each position's column.
    length: length of the batch's rows.
    count: divisor of the sum of losses for the mean: the number of counted tokens, or of examples that have any.
    """

    rows: Tensor
    columns: Tensor
    wanted: Tensor
    sizes: Tensor | None
    kept: Tensor
    of_kept: Tensor
    length: int
    count: int

    def to(self, device: Any, non_blocking: bool = False) -> "Counted":
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Counted":
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Counted":
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: change(tensor) for name, tensor in tensors.items()})


def counted_of(wanted: Tensor, reduction: Reduction, position_ids: Tensor | None = None) -> Counted:
    """Return the counted positions of ``targets`` of a batch.

    position_ids: (batch, length), which rise by one within an example; only if a row contains several examples.
    """
    rows, columns = (wanted != IGNORED).nonzero(as_tuple=True)
    sizes, count = None, len(rows)
    if reduction == "example":
        example = examples_of(wanted, position_ids)[rows, columns]
        tokens = example.bincount()
        sizes, count = tokens[example], int(tokens.count_nonzero())
    kept, of_kept = columns.unique(return_inverse=True)
    kept = kept if len(kept) else kept.new_zeros(1)
    return Counted(rows, columns, wanted[rows, columns], sizes, kept, of_kept, wanted.shape[1], count)


def loss_sum(logits: Tensor, wanted: Tensor, reduction: Reduction, position_ids: Tensor | None = None) -> Tensor:
    """Return the sum of the cross-entropies of all tokens, or of all examples' mean cross-entropies.

    logits: as in ``loss_at``.  wanted: ``targets`` of the batch.  position_ids: as in ``counted_of``.
    Divide by ``loss_count`` for the mean.
    """
    return loss_at(logits, counted_of(wanted, reduction, position_ids).to(logits.device))


def loss_at(logits: Tensor, counted: Counted) -> Tensor:
    """Return ``loss_sum`` at known positions, on the device of the logits, without a host synchronisation.

    logits: (batch, length, vocabulary), or (batch, classes) of a classification head; (batch, k, vocabulary) if only
    those at ``counted.kept`` were computed.  The loss is computed in at least fp32, for the counted tokens only.
    Raises ValueError: another number of columns.
    """
    logits = logits[:, None] if logits.dim() == 2 else logits
    if logits.shape[1] not in (counted.length, len(counted.kept)):
        raise ValueError(
            f"the model returned logits of {logits.shape[1]} positions, not of all {counted.length} or of the "
            f"{len(counted.kept)} that logits_to_keep names: its forward must take a tensor of indices there, as in "
            "transformers, or have no such argument"
        )
    columns = counted.columns if logits.shape[1] == counted.length else counted.of_kept
    places = counted.rows * logits.shape[1] + columns
    chosen = logits.flatten(0, 1).index_select(0, places)
    chosen = chosen if chosen.dtype == torch.float64 else chosen.float()
    losses = cross_entropy(chosen, counted.wanted, reduction="none")
    return (losses if counted.sizes is None else losses / counted.sizes).sum()


def loss_count(wanted: Tensor, reduction: Reduction, position_ids: Tensor | None = None) -> int:
    """Return the divisor of ``loss_sum`` for the mean: the number of counted tokens, or of examples that have any."""
    return counted_of(wanted, reduction, position_ids).count


def counted_in(batch: Batch, reduction: Reduction) -> Counted:
    """Return the counted positions of a batch, whose rows may contain several examples."""
    return counted_of(targets(batch), reduction, packed_positions(batch))


def batch_count(batch: Batch, reduction: Reduction) -> int:
    """Return the divisor of ``batch_loss`` for the mean."""
    return counted_in(batch, reduction).count


def packed_positions(batch: Batch) -> Tensor | None:
    """Return the position_ids of a causal batch, whose rows may contain several examples; None: there are none."""
    positions, labels = batch.get("position_ids"), batch["labels"]
    causal = labels.dim() == 2 and "decoder_input_ids" not in batch
    return positions if causal and positions is not None and positions.shape == labels.shape else None


def examples_of(wanted: Tensor, position_ids: Tensor | None) -> Tensor:
    """Return the index of each token's example in the batch, (batch, length); a row is one example by default."""
    starts = torch.zeros_like(wanted)
    starts[:, 0] = 1
    if position_ids is not None:  # they may begin at another number than 0
        starts[:, 1:] = position_ids.diff(dim=1).ne(1)
    return starts.flatten().cumsum(0).view_as(wanted) - 1


def model_logits(model: nn.Module, batch: Batch, **options: Any) -> Tensor:
    """Return the model's logits for a batch, which is moved to the model's device."""
    device = next(model.parameters()).device
    inputs = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
        if name != "labels"
    }
    return model(**inputs, **options, use_cache=False).logits


def answer_logits(model: nn.Module, batch: Batch, counted: Counted | None = None) -> Tensor:
    """Return the logits at the columns that have a counted position, as input of ``loss_sum``.

    The logits of prompts are not needed, and with 100,000 vocabulary entries they take much of the memory and time.
    """
    return model_logits(model, batch, **few_logits(model, batch, counted))


def batch_loss(model: nn.Module, batch: Batch, reduction: Reduction) -> tuple[Tensor, int, Tensor]:
    """Return the sum of a batch's losses, its divisor for the mean, and the ``answer_logits``.

    The counted positions are computed once, on the device of the labels.
    """
    counted = counted_in(batch, reduction)
    logits = answer_logits(model, batch, counted)
    return loss_at(logits, counted.to(logits.device)), counted.count, logits


def few_logits(model: nn.Module, batch: Batch, counted: Counted | None = None) -> dict[str, Tensor]:
    """Return the option that makes a causal model on one device compute the ``answer_logits`` only; {} for others.

    counted: the counted positions of this batch, if known.
    """
    split = len(set(getattr(model, "hf_device_map", {}).values())) > 1  # the output layer is on another device
    if batch["labels"].dim() == 1 or "decoder_input_ids" in batch or split or not keeps_logits(model):
        return {}
    counted = counted or counted_of(targets(batch), "token")
    return {"logits_to_keep": counted.kept.to(next(model.parameters()).device)}


def keeps_logits(model: nn.Module) -> bool:
    """Return whether a model, or the base model of an adapter, accepts ``logits_to_keep``."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in parameters_of(type(inner))


@cache
def parameters_of(kind: type[nn.Module]) -> frozenset[str]:
    """Return the names of the arguments of a module's forward."""
    return frozenset(inspect.signature(kind.forward).parameters)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Return a context in which the whole model is in evaluation mode; every module's mode is restored afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[Batch], reduction: Reduction) -> float:
    """Return the mean loss over batches without dropout; it does not depend on batch size or padding."""
    total, count = 0.0, 0
    with evaluating(model):
        for batch in batches:
            loss, examples, _ = batch_loss(model, batch, reduction)
            total += float(loss)
            count += examples
    return total / count
