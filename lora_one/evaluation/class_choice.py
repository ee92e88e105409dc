"""The class that a model chooses: by its classification head, or by the first tokens of the classes' words."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_one.data.encode import Encoded, Encoder, collate, common_beginning
from lora_one.distributed import Processes
from lora_one.errors import RunError, UsageError
from lora_one.evaluation.batches import each_batch
from lora_one.evaluation.choices import Question
from lora_one.evaluation.engines.protocol import Engine
from lora_one.evaluation.loading import LoadedModel
from lora_one.losses import IGNORED, evaluating, model_logits, targets
from lora_one.model_kinds import CAUSAL
from lora_one.models import learnt_positions
from lora_one.types import Example

NUMBERED = re.compile(r"(label_)?\d+")


def words_of(names: Sequence[str], labels: Sequence[str]) -> list[str]:
    """Return the word of each output of a head.

    names: those of its configuration. If they are the labels, in any case and order, their order is used; if they are
    only numbered (LABEL_0), that of the labels.
    Raises UsageError: the head has another number of outputs, or outputs with other names.
    """
    lower = [name.lower() for name in names]
    if len(names) == len(labels):
        if set(lower) == set(labels):
            return lower
        if all(NUMBERED.fullmatch(name) for name in lower):
            return list(labels)
    raise UsageError(
        f"the model's head was trained for another task: its {len(names)} outputs are {', '.join(names)}, but this set "
        f"has the {len(labels)} classes {', '.join(labels)}: pass a model that was trained on it, or the --dataset of "
        "this model"
    )


@dataclass(frozen=True)
class HeadChooser:
    """Chooses the output of a classification head with the largest logit, for a batch of rows."""

    model: nn.Module
    rows: Mapping[int, Encoded]
    pad_id: int

    def __call__(self, batch: Sequence[int]) -> list[int]:
        return largest(model_logits(self.model, collate([self.rows[index] for index in batch], self.pad_id)))


@dataclass(frozen=True)
class FirstTokenChooser:
    """Chooses the class whose token is likeliest at one position after the prompt, for a batch of rows.

    tokens: the token of each class.  skipped: tokens of the response before that position.
    """

    model: nn.Module
    rows: Mapping[int, Encoded]
    pad_id: int
    tokens: list[int]
    skipped: int

    def __call__(self, batch: Sequence[int]) -> list[int]:
        collated = collate([self.rows[index] for index in batch], self.pad_id)
        place = (targets(collated) != IGNORED).int().argmax(dim=1) + self.skipped
        logits = model_logits(self.model, collated)
        return largest(logits[range(len(batch)), place][:, self.tokens])


def by_head(
    loaded: LoadedModel, encoder: Encoder, examples: Sequence[Example], max_length: int, done: Collection[int]
) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """Yield (index, the output with the largest logit, details), longest texts first.

    With several processes, each one yields its share. A text is truncated to max_length tokens, or to the number of
    positions that the model has learnt; the details say so.
    """
    found = encoder.rows(examples, min(max_length, learnt_positions(loaded.model) or max_length))
    rows = dict(enumerate(row for row, _ in found))
    details = [{"shortened": True} if short else {} for _, short in found]
    for index, place in in_batches(loaded, rows, HeadChooser(loaded.model, rows, encoder.pad_id), done):
        if index not in done:
            yield index, place, details[index]


def by_first_token(
    engine: Engine, examples: Sequence[Example], labels: Sequence[str], done: Collection[int]
) -> dict[int, dict[str, Any]]:
    """Return index -> the class whose word has the likeliest first token after the prompt.

    This is the published comparison, which has two words, for any number of words. Tokens that all words begin with
    (an encoder-decoder's BOS, for example) are read first, and the next token is compared.
    Raises UsageError: two words have the same token there.
    """
    encoder, context = engine.encoder, engine.context
    tokens, skipped = first_tokens(encoder, examples[0].prompt, labels)
    kept = [index for index, ids in enumerate(encoder.prompts(examples)) if len(ids) + max(skipped, 1) <= context]
    encoded = encoder.encode([examples[index] for index in kept], context)[0] if kept else []
    rows = dict(zip(kept, encoded, strict=True))
    nothing = {"prediction_first_token": None, "correct_first_token": False}
    found: dict[int, dict[str, Any]] = dict.fromkeys(set(range(len(examples))) - set(kept), nothing)
    if engine.kind is CAUSAL:
        places = likeliest_tokens(engine, rows, tokens, skipped, done)
    else:
        chooser = FirstTokenChooser(engine.loaded.model, rows, encoder.pad_id, tokens, skipped)
        places = in_batches(engine.loaded, rows, chooser, done)
    for index, place in places:
        word = labels[place]
        found[index] = {"prediction_first_token": word, "correct_first_token": word == examples[index].gold}
    return {index: line for part in Processes.current().gathered(found) for index, line in part.items()}


def likeliest_tokens(
    engine: Engine, rows: Mapping[int, Encoded], tokens: Sequence[int], skipped: int, done: Collection[int]
) -> Iterator[tuple[int, int]]:
    """Yield (index, place of the likeliest of the tokens) after the prompt and ``skipped`` tokens of the response."""
    questions = []
    for row in rows.values():
        begin = next(place for place, label in enumerate(row.labels) if label != IGNORED)  # of the response
        questions.append(Question(row.input_ids[: begin + skipped], [[token] for token in tokens]))
    indices = list(rows)
    known = {place for place, index in enumerate(indices) if index in done}
    for place, values in engine.log_likelihoods(questions, known):
        yield indices[place], max(range(len(values)), key=values.__getitem__)


def first_tokens(encoder: Encoder, prompt: str, labels: Sequence[str]) -> tuple[list[int], int]:
    """Return the first token in which the words differ, for each word, and the number of tokens before it.

    Raises UsageError: two words have the same token there.
    """
    responses = encoder.encode([Example(prompt, word) for word in labels], 1 << 30)[0]
    wanted = targets(collate(responses, encoder.pad_id))
    words = [row[row != IGNORED].tolist() for row in wanted]
    alike = len(common_beginning(words))
    tokens = [word[alike] for word in words]
    if len(set(tokens)) < len(tokens):
        raise UsageError(
            f"--first_token cannot distinguish {', '.join(labels)}: with this tokenizer, two of these words begin with "
            "the same token; leave the option out"
        )
    return tokens, alike


def in_batches(
    loaded: LoadedModel,
    rows: Mapping[int, Encoded],
    choose: Callable[[Sequence[int]], list[int]],
    done: Collection[int],
) -> Iterator[tuple[int, int]]:
    """Yield (index, what ``choose`` returns for it), longest rows first; with several processes, only this one's share.

    Batches that consist of indices in ``done`` are left out.
    """
    order = sorted(rows, key=lambda index: -len(rows[index].input_ids))
    with torch.no_grad(), evaluating(loaded.model):
        for batch, places in each_batch(order, loaded.batch_size, choose, done, Processes.current()):
            yield from zip(batch, places, strict=True)


def largest(logits: Tensor) -> list[int]:
    """Return the index of the largest logit in each row. Raises RunError: a logit is not finite."""
    if not logits.isfinite().all():
        raise RunError("the model computes logits that are not finite: try --dtype=fp32, or check the checkpoint")
    return logits.argmax(-1).tolist()
