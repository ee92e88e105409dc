"""Log-likelihoods of answers after prompts; what the prompts have in common goes through the model once."""

import copy
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lora_one.data.encode import embedded, prompt_ids
from lora_one.distributed import Processes
from lora_one.errors import RunError, UsageError
from lora_one.evaluation.batches import each_batch
from lora_one.losses import evaluating, keeps_logits

ENDING = 4  # tokens


@dataclass(frozen=True)
class Question:
    """Token ids of what stands before the answers, and of each answer as it goes on from there; none is empty."""

    context: list[int]
    answers: list[list[int]]

    @property
    def length(self) -> int:
        """Positions the model must have: an answer's last token is predicted, not read."""
        return len(self.context) + max(map(len, self.answers)) - 1


def question_of(tokenizer: Any, prompt: str, answers: Sequence[str]) -> Question:
    """Tokenize the prompt with each answer as one text; an answer is what follows the tokens they share.

    That is what a model would have to produce there, whether the tokenizer puts the space of " A" into the letter's
    token, before it or nowhere; where an answer changes the prompt's last token, that token belongs to the answer.
    """
    texts = prompt_ids(tokenizer, [prompt, *(prompt + answer for answer in answers)])
    shared = len(common_beginning(texts))
    return Question(texts[0][:shared], [ids[shared:] for ids in texts[1:]])


def questions_of(tokenizer: Any, prompts: Sequence[str], answers: Sequence[str]) -> list[Question]:
    """The same for many prompts, each tokenized once: where their last tokens agree, so do the answers behind them.

    That is how far tokenizers look. Where an answer changes the prompt's last token nothing is taken over.
    """
    found: list[Question] = []
    known: dict[tuple[int, ...], list[list[int]]] = {}
    for prompt, ids in zip(prompts, prompt_ids(tokenizer, prompts), strict=True):
        ending = tuple(ids[-ENDING:])
        if ending in known:
            found.append(Question(ids, known[ending]))
            continue
        found.append(question_of(tokenizer, prompt, answers))
        if found[-1].context == ids:
            known[ending] = found[-1].answers
    return found


def common_beginning(rows: Sequence[list[int]]) -> list[int]:
    """The tokens with which all rows begin."""
    first, last = min(rows), max(rows)  # in order of tokens, so every other row lies between them
    differ = (place for place, (one, other) in enumerate(zip(first, last, strict=False)) if one != other)
    return first[: next(differ, len(first))]


@dataclass(frozen=True)
class Row:
    """One line of a batch: tokens behind the shared prefix, and which answers can be read off where.

    ``ask``: for each answer of the question that this row serves, its place among them and its tokens; the first of
    them is predicted at position ``first`` of the row.
    """

    question: int
    tokens: list[int]
    first: int
    ask: list[tuple[int, list[int]]]


@torch.no_grad()
def log_likelihoods(
    model: nn.Module,
    questions: Sequence[Question],
    batch_size: int,
    done: Container[int] = (),
) -> Iterator[tuple[int, list[float]]]:
    """Yield (index, [log p(answer | context) of each answer]), ``batch_size`` questions at a time, longest first.

    Of several processes each has its share of the batches.

    The tokens with which all contexts begin are read once; the rest of each goes behind their keys and values,
    padded on the right, where causal attention never looks from a real token, so positions need no correction.
    Batches are made of all questions, so that those in ``done``, which are not yielded, leave the others' batches,
    hence their last digits, as they are.
    Raises RunError: the model gives no finite number. UsageError: it is no causal model, or a token has no embedding.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise UsageError("likelihoods of answers are read off causal models, and this is an encoder-decoder: take one")
    tokens = [row for question in questions for row in (question.context, *question.answers)]
    embedded(tokens, model.get_input_embeddings().num_embeddings)
    order = sorted(range(len(questions)), key=lambda index: -questions[index].length)
    if all(index in done for index in order):
        return
    prefix = common_beginning([question.context for question in questions])
    prefix = prefix[: min(len(question.context) for question in questions) - 1]  # each reads at least one token
    with evaluating(model):
        cache_for = prefilled(model, prefix)
        read = len(prefix) if cache_for else 0

        def compared(batch: Sequence[int]) -> dict[int, list[float]]:
            rows = [row for index in batch for row in rows_to_read(index, questions[index], read)]
            found = {index: [0.0] * len(questions[index].answers) for index in batch}
            shared = {"past_key_values": cache_for(len(rows))} if cache_for else {}
            for row, values in zip(rows, scores(model, rows, **shared), strict=True):
                for (place, _), value in zip(row.ask, values, strict=True):
                    found[row.question][place] = value
            return found

        for _, found in each_batch(order, batch_size, compared, done, Processes.current()):
            yield from ((index, values) for index, values in found.items() if index not in done)


def rows_to_read(index: int, question: Question, read: int) -> list[Row]:
    """The fewest rows that hold every answer but its last token: for letters one, whatever their tokens."""
    rest = question.context[read:]
    rows: list[Row] = []
    for place, answer in sorted(enumerate(question.answers), key=lambda answer: -len(answer[1])):
        needed = rest + answer[:-1]
        row = next((row for row in rows if row.tokens[: len(needed)] == needed), None)
        if row is None:
            row = Row(index, needed, len(rest) - 1, [])
            rows.append(row)
        row.ask.append((place, answer))
    return rows


def scores(model: nn.Module, rows: Sequence[Row], **shared: Any) -> Iterator[list[float]]:
    """For each row the log-likelihoods of its answers, summed over their tokens in fp32.

    Raises RunError: the model gives a number that is not finite.
    """
    longest = max(len(row.tokens) for row in rows)
    ids = torch.tensor([row.tokens + [0] * (longest - len(row.tokens)) for row in rows])
    places = sorted({place for row in rows for place in range(row.first, len(row.tokens))})
    logits = logits_at(model, ids, places, **shared)  # (rows, places, vocabulary)
    where = {place: column for column, place in enumerate(places)}
    for row, line in zip(rows, logits, strict=True):
        columns = [where[place] for place in range(row.first, len(row.tokens))]
        log_p = line[columns].float().log_softmax(-1)
        values = [float(log_p[range(len(answer)), answer].sum()) for _, answer in row.ask]
        if not all(map(isfinite, values)):
            raise RunError(f"the model gives log-likelihoods {values}: try --dtype=fp32, or check the checkpoint")
        yield values


def logits_at(model: nn.Module, ids: Tensor, places: list[int], **options: Any) -> Tensor:
    """Logits (rows, places, vocabulary); the others are not even computed where the model can leave them out."""
    device = next(model.parameters()).device
    ids = ids.to(device)
    if keeps_logits(model):
        return model(input_ids=ids, logits_to_keep=torch.tensor(places, device=device), **options).logits
    return model(input_ids=ids, **options).logits[:, places]


def prefilled(model: nn.Module, prefix: list[int]) -> Callable[[int], Any] | None:
    """Read the prefix; give what makes its cache for a number of rows, or None where there is nothing to reuse.

    Keys and values are lent to every batch: a layer hands them out in front of the new ones and keeps nothing, so the
    memory is that of one row. States of other kinds (recurrent layers) are copied for each batch.
    """
    if not prefix:
        return None
    device = next(model.parameters()).device
    few = {"logits_to_keep": 1} if keeps_logits(model) else {}
    output = model(input_ids=torch.tensor([prefix], device=device), use_cache=True, **few)
    cache = getattr(output, "past_key_values", None)
    if cache is None:
        return None
    if all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        for layer in cache.layers:
            layer.update = lender(layer.keys, layer.values)
        return lambda rows: cache

    def copied(rows: int) -> Any:
        own = copy.deepcopy(cache)
        own.reorder_cache(torch.zeros(rows, dtype=torch.long, device=device))
        return own

    return copied


def lender(*kept: Tensor) -> Callable[..., tuple[Tensor, ...]]:
    """A cache layer's update that does not keep what it is given: (1, heads, prefix, size) before (rows, ...)."""

    def update(*new: Tensor, **_: Any) -> tuple[Tensor, ...]:
        pairs = zip(kept, new[: len(kept)], strict=True)
        return tuple(torch.cat([old.expand(len(fresh), -1, -1, -1), fresh], dim=-2) for old, fresh in pairs)

    return update
