"""The loss of causal language modelling, one definition for training, validation and the one-step gradient."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

IGNORED = -100  # label of prompt and padding
Reduction = Literal["example", "token"]
Batch = dict[str, Tensor]


def loss_sum(logits: Tensor, labels: Tensor, reduction: Reduction, position_ids: Tensor | None = None) -> Tensor:
    """Sum of cross-entropies: over tokens, or over examples of each example's mean over its tokens.

    logits: (batch, length, vocabulary), the one at t predicts the label at t + 1; labels: (batch, length).
    position_ids: only where a row holds several examples (batch, length), 0 where one begins.
    Computed in at least fp32, for the counted tokens only.  Divide by ``loss_count`` for the mean.
    """
    targets = labels[:, 1:]
    counted = targets != IGNORED
    chosen = logits[:, :-1][counted]
    chosen = chosen if chosen.dtype == torch.float64 else chosen.float()
    losses = cross_entropy(chosen, targets[counted], reduction="none")
    if reduction == "example":
        example = examples_of(labels, position_ids)[:, 1:][counted]
        losses = losses / example.bincount()[example]
    return losses.sum()


def loss_count(labels: Tensor, reduction: Reduction, position_ids: Tensor | None = None) -> int:
    """What ``loss_sum`` is divided by for the mean: tokens that count, or examples that have one."""
    counted = labels[:, 1:] != IGNORED
    if reduction == "token":
        return int(counted.sum())
    return examples_of(labels, position_ids)[:, 1:][counted].unique().numel()


def examples_of(labels: Tensor, position_ids: Tensor | None) -> Tensor:
    """Which example each token is of, counted through the batch (batch, length): a row's, or by where they begin."""
    starts = torch.zeros_like(labels)
    starts[:, 0] = 1
    if position_ids is not None:
        starts = position_ids.eq(0).long()
    return starts.flatten().cumsum(0).view_as(labels) - 1


def model_logits(model: nn.Module, batch: Batch) -> Tensor:
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
    return model(**inputs, use_cache=False).logits


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
            logits = model_logits(model, batch)
            total += float(loss_sum(logits, batch["labels"].to(logits.device), reduction))
            count += loss_count(batch["labels"], reduction)
    return total / count
