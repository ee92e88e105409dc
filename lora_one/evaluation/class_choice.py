"""The class that a model chooses: by its classification head, or by the first tokens of the classes' words."""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_one.data.encode import Encoded, Encoder, collate
from lora_one.distributed import Processes
from lora_one.errors import RunError, UsageError
from lora_one.evaluation.batches import each_batch
from lora_one.evaluation.choices import common_beginning
from lora_one.evaluation.generate import context_length
from lora_one.evaluation.loading import LoadedModel
from lora_one.losses import IGNORED, evaluating, model_logits, targets
from lora_one.models import learnt_positions
from lora_one.types import Example


def words_of(config: Any, labels: Sequence[str]) -> list[str]:
    """Return the word of each output of a head: the checkpoint's own names if these are the set's, in any case; else
    the words in the set's order.

    Raises UsageError: the head has another number of outputs.
    """
    own = [config.id2label[place] for place in range(config.num_labels)]
    if len(own) != len(labels):
        raise UsageError(
            f"the model's head has {len(own)} outputs, and this set {len(labels)} classes ({', '.join(labels)}): give "
            "a model that was trained on it"
        )
    own = [str(name).lower() for name in own]
    return own if set(own) == set(labels) else list(labels)


def by_head(
    loaded: LoadedModel, encoder: Encoder, examples: Sequence[Example], max_length: int, done: Collection[int]
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yield (index, the output with the largest logit, details), longest texts first.

    Of several processes each has its share. A text is cut at max_length, or at what positions the model has learnt;
    the details say so.
    """
    found = encoder.rows(examples, min(max_length, learnt_positions(loaded.model) or max_length))
    rows = [row for row, _ in found]
    cut = [{"shortened": True} if short else {} for _, short in found]

    def chosen(batch: Sequence[int]) -> list[int]:
        return largest(model_logits(loaded.model, collate([rows[index] for index in batch], encoder.pad_id)))

    for index, place in in_batches(loaded, dict(enumerate(rows)), chosen, done):
        if index not in done:
            yield index, place, cut[index]


def by_first_token(
    loaded: LoadedModel, encoder: Encoder, examples: Sequence[Example], labels: Sequence[str], done: Collection[int]
) -> dict[int, dict[str, Any]]:
    """Return index -> the class whose word's first token is likeliest after the prompt, of those of all words.

    The published comparison, which is of two words, holds with any number of them; tokens with which all words begin
    (an encoder-decoder's BOS, say) are read first. Raises UsageError: two words do not differ at the next one.
    """
    as_answers = encoder.encode([Example(examples[0].prompt, word) for word in labels], 1 << 30)[0]
    wanted = targets(collate(as_answers, encoder.pad_id))
    words = [row[row != IGNORED].tolist() for row in wanted]
    alike = len(common_beginning(words))
    tokens = [word[alike] for word in words]
    if len(set(tokens)) < len(tokens):
        raise UsageError(
            f"--first_token cannot tell {', '.join(labels)} apart: for this tokenizer two of them begin with "
            "the same token; leave it out"
        )
    context = context_length(loaded.model)
    kept = [index for index, ids in enumerate(encoder.prompts(examples)) if len(ids) + max(alike, 1) <= context]
    encoded = encoder.encode([examples[index] for index in kept], context)[0] if kept else []
    rows = dict(zip(kept, encoded, strict=True))

    def compared(batch: Sequence[int]) -> list[int]:
        together = collate([rows[index] for index in batch], encoder.pad_id)
        first = (targets(together) != IGNORED).int().argmax(dim=1) + alike
        logits = model_logits(loaded.model, together)
        return largest(logits[range(len(batch)), first][:, tokens])

    nothing = {"prediction_first_token": None, "correct_first_token": False}
    found: dict[int, dict[str, Any]] = dict.fromkeys(set(range(len(examples))) - set(kept), nothing)
    for index, place in in_batches(loaded, rows, compared, done):
        word = labels[place]
        found[index] = {"prediction_first_token": word, "correct_first_token": word == examples[index].gold}
    return {index: line for part in Processes.current().gathered(found) for index, line in part.items()}


def in_batches(
    loaded: LoadedModel,
    rows: dict[int, Encoded],
    choose: Callable[[Sequence[int]], list[int]],
    done: Collection[int],
) -> Iterator[tuple[int, int]]:
    """Yield (index, what ``choose`` returns for it), longest rows first; each of several processes has its share."""
    order = sorted(rows, key=lambda index: -len(rows[index].input_ids))
    with torch.no_grad(), evaluating(loaded.model):
        for batch, places in each_batch(order, loaded.batch_size, choose, done, Processes.current()):
            yield from zip(batch, places, strict=True)


def largest(logits: Tensor) -> list[int]:
    """Return the class with the largest logit in each row. Raises RunError: a logit is not finite."""
    if not logits.isfinite().all():
        raise RunError("the model computes logits that are not finite: try --dtype=fp32, or check the checkpoint")
    return logits.argmax(-1).tolist()
