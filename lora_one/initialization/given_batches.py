"""The batches that a caller of ``initialize_adapters`` passes, one batch, a list or a data loader; parts of batches."""

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lora_one.distributed import Processes
from lora_one.errors import UsageError
from lora_one.initialization.cache import content_of
from lora_one.losses import IGNORED, Batch, batch_count
from lora_one.model_kinds import OTHER_TASKS
from lora_one.models import kind_of

OF_DECODER = ("decoder_input_ids", "decoder_attention_mask", "labels")  # padded apart from the encoder's input


def take(
    model: nn.Module, batches: Batch | Iterable[Batch], wanted: int | None, *, further: bool
) -> tuple[list[Batch], list[Batch] | None]:
    """Return batches of the first ``wanted`` examples, and of as many following ones; None: all examples.

    With a classification head the following ones are at least 32, or what there is. The second list is None unless
    ``further`` is set and there are as many as ``wanted``. The batches of an encoder-decoder get decoder_input_ids.
    Raises UsageError: there are no examples, no labels in the form that this kind of model needs, or a model of another
    task.
    """
    if wanted is not None and wanted < 1:
        raise UsageError(f"examples={wanted} is out of range: it must be at least 1, or None for all examples")
    refuse_other_task(model)
    taken: list[Batch] = []
    most = kind_of(model).searched(wanted) if further and wanted is not None else 0
    count, limit = 0, math.inf if wanted is None else wanted + most
    for batch in [batches] if isinstance(batches, Mapping) else batches:
        taken.append(checked(model, batch))
        count += len(batch["labels"])
        if count >= limit:
            break
    own = rows_between(taken, 0, count if wanted is None else wanted)
    if not count:
        raise UsageError("batches contains no examples to compute a gradient from: pass at least one batch")
    if not any(batch_count(batch, "token") for batch in own):
        raise UsageError("batches: every label is -100, so there is no loss; pass examples that contain an answer")
    others = rows_between(taken, wanted, min(wanted + most, count)) if most and count >= 2 * wanted else None
    if others and not any(batch_count(batch, "token") for batch in others):
        others = None
    contents = Processes.current().gathered(content_of([*own, *(others or ())]))
    if len(set(contents)) > 1:
        raise UsageError(
            "batches: they differ between processes, but each process must pass the same ones; use a data loader that "
            "is not sharded"
        )
    if wanted is not None and count < wanted:
        warnings.warn(f"batches contains {count} examples, fewer than examples={wanted}: all are used", stacklevel=4)
    return own, others


def checked(model: nn.Module, batch: Batch) -> Batch:
    """Return the batch, for an encoder-decoder with decoder_input_ids.

    Raises UsageError: it has no labels, or not in the form that this kind of model needs.
    """
    if not isinstance(batch, Mapping):
        raise UsageError(
            f"batches: a batch is a {type(batch).__name__}, but it must be a dictionary of tensors, as model(**batch) "
            "takes it"
        )
    kind = kind_of(model)
    dimensions, form = kind.label_dimensions, "(batch,)" if kind.has_head else "(batch, length)"
    if "labels" not in batch:
        raise UsageError(f"batches: a batch has {', '.join(batch)} but no labels, which the loss needs: add them")
    if batch["labels"].dim() != dimensions:
        raise UsageError(
            f"batches: labels have shape {tuple(batch['labels'].shape)}, but this kind of model needs {form}"
        )
    if batch["labels"].is_floating_point() or (kind.has_head and model.config.num_labels < 2):
        outputs = f", and the head has {model.config.num_labels} output(s)" if kind.has_head else ""
        raise UsageError(
            f"batches: labels are {batch['labels'].dtype}{outputs}, but the loss is the cross-entropy of at least two "
            "classes, or of tokens (int64): regression is not supported"
        )
    if kind.has_decoder and "decoder_input_ids" not in batch:
        return dict(batch) | {"decoder_input_ids": model.prepare_decoder_input_ids_from_labels(batch["labels"])}
    return dict(batch)


def refuse_other_task(model: nn.Module) -> None:
    """Raise UsageError if the model's labels belong to another task: they would be taken for a causal model's."""
    name = type(model).__name__
    if name.endswith(OTHER_TASKS):
        raise UsageError(
            f"model is a {name}, whose loss is not known here: pass a causal model, an encoder-decoder, or one with a "
            "head for sequence classification, or choose a method that needs no batches"
        )


def rows_between(batches: Iterable[Batch], first: int, end: int) -> list[Batch]:
    """Return the examples from number ``first`` up to, not including, ``end``, in their original batches."""
    found, count = [], 0
    for batch in batches:
        rows = len(batch["labels"])
        part = slice(max(0, first - count), max(0, end - count))
        if len(batch["labels"][part]):
            found.append(rows_of(batch, part))
        count += rows
    return found


def rows_of(batch: Batch, part: slice) -> Batch:
    """Return some examples of a batch, that is, these rows of its tensors; values that are not tensors stay.

    Raises UsageError: a tensor does not have one row for each example, and only some of the examples are wanted.
    """
    count = len(batch["labels"])
    if len(range(count)[part]) == count:
        return dict(batch)
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.dim()}
    for name, value in tensors.items():
        if len(value) != count:
            raise UsageError(
                f"batches: {name} has shape {tuple(value.shape)}, so it cannot be divided among the {count} examples "
                "of its batch, of which only some are needed: pass batches of one example"
            )
    return dict(batch) | {name: value[part] for name, value in tensors.items()}


def read_by_decoder(batch: Batch, row: int) -> Tensor:
    """Return which positions of an example a decoder reads: those of its mask, else all up to the last label."""
    if "decoder_attention_mask" in batch:
        return batch["decoder_attention_mask"][row].bool()
    return (batch["labels"][row] != IGNORED).flip(0).cumsum(0).flip(0) > 0


def one_by_one(batches: Sequence[Batch]) -> Iterator[Batch]:
    """Yield each example as a batch of one, without padding.

    A layer then reads exactly the tokens of the examples, and a mean over batches weights all examples equally.
    """
    for batch in batches:
        for row, real in enumerate(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()):
            places = dict.fromkeys(OF_DECODER, read_by_decoder(batch, row)) if "decoder_input_ids" in batch else {}
            yield {
                name: value[:, places.get(name, real)] if isinstance(value, Tensor) and value.dim() > 1 else value
                for name, value in rows_of(batch, slice(row, row + 1)).items()
            }
