"""Batches from the texts of a caller, for ``lora_one.initialize_adapters`` and an own training loop."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lora_one.data.encode import batches_of
from lora_one.data.encoders import encoder_of
from lora_one.errors import UsageError
from lora_one.losses import Batch
from lora_one.models import kind_of
from lora_one.types import Example


def encode_batches(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Example | tuple[str, str] | Mapping[str, str]],
    *,
    batch_size: int = 8,
    max_length: int = 1024,
    chat_template: bool = False,
) -> list[Batch]:
    """Return batches of rows as the model takes them, in order, with a loss on the response only.

    rows: (prompt, response) pairs, mappings with the keys ``prompt`` and ``response``, or Examples; they are encoded as
    in a run. ``lora_one.Example`` also describes the input of a classification head.
    max_length: tokens; longer rows are cut, and rows without a response token within it are left out with a warning.
    Raises UsageError: a row is of another form, no row is left, a token has no embedding, or the tokenizer has no chat
    template.
    """
    examples = [example_of(row, number) for number, row in enumerate(rows)]
    if not examples:
        raise UsageError("there are no rows: pass (prompt, response) pairs")
    if kind_of(model).has_head and not all(example.texts for example in examples):
        raise UsageError("the model has a classification head: pass lora_one.Example(texts=(<text>,), label=<class>)")
    encoder = encoder_of(kind_of(model), tokenizer, model.config, chat=chat_template)
    encoded, counts = encoder.encode(examples, max_length)
    if not encoded:
        raise UsageError(
            f"none of the {len(examples)} rows has a response token within max_length={max_length}: raise it"
        )
    if counts.dropped:
        warnings.warn(
            f"{counts.dropped} of {len(examples)} rows have no response token within max_length={max_length} and are "
            "left out: raise it to keep them",
            stacklevel=2,
        )
    return batches_of(encoded, batch_size, encoder.pad_id)


def example_of(row: Any, number: int) -> Example:
    """Return a row as an Example. number: its index. Raises UsageError: it is of another form."""
    if isinstance(row, Example):
        return row
    pair = [row.get("prompt"), row.get("response")] if isinstance(row, Mapping) else row
    if isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(text, str) for text in pair):
        return Example(*pair)
    raise UsageError(
        f"row {number} is {row!r:.80}: pass a (prompt, response) pair of texts, a mapping with the keys prompt and "
        "response, or a lora_one.Example"
    )
