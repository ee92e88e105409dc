"""Log-likelihoods of answers after prompts; the tokens that all prompts begin with are read only once."""

import copy
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lora_one.data.encode import common_beginning, embedded, prompt_ids
from lora_one.distributed import Processes
from lora_one.errors import RunError, UsageError
from lora_one.evaluation.batches import each_batch
from lora_one.losses import evaluating, keeps_logits
from lora_one.model_kinds import CAUSAL
from lora_one.models import kind_of

ENDING = 4  # the last tokens of a prompt, which determine how an answer after it is tokenized


@dataclass(frozen=True)
class Question:
    """Token ids of a prompt (``context``) and of each answer that may follow it; none of them is empty."""

    context: list[int]
    answers: list[list[int]]

    @property
    def length(self) -> int:
        """Return the number of positions that the model needs; the last token of an answer is not an input."""
        return len(self.context) + max(map(len, self.answers)) - 1


def question_of(tokenizer: Any, prompt: str, answers: Sequence[str]) -> Question:
    """Tokenize the prompt with each answer as one text; an answer is the part after the tokens that all texts share.

    These are the tokens that a model would have to generate, whether the tokenizer puts the space of " A" into the
    letter's token, before it or nowhere. If an answer changes the last token of the prompt, this token is part of the
    answer.
    """
    texts = prompt_ids(tokenizer, [prompt, *(prompt + answer for answer in answers)])
    shared = len(common_beginning(texts))
    return Question(texts[0][:shared], [ids[shared:] for ids in texts[1:]])


def questions_of(tokenizer: Any, prompts: Sequence[str], answers: Sequence[str]) -> list[Question]:
    """Return ``question_of`` for many prompts, but tokenize each prompt only once.

    If the last tokens of two prompts are equal, so are the tokens of the answers after them, because tokenizers do not
    look further back. Answers that change the last token of a prompt are tokenized with each prompt.
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


def shared_beginning(questions: Sequence[Question]) -> list[int]:
    """Return the tokens that all contexts begin with, without the last token of the shortest context."""
    beginning = common_beginning([question.context for question in questions])
    return beginning[: min(len(question.context) for question in questions) - 1]  # each reads one token or more


def most_tokens(questions: Sequence[Question]) -> int:
    """Return the largest number of tokens of a question after those that all share, counted for each answer."""
    shared = len(shared_beginning(questions)) if questions else 0
    return max(((question.length - shared) * len(question.answers) for question in questions), default=1)


@dataclass(frozen=True)
class Row:
    """One row of a batch: the tokens after the shared prefix, and the answers whose likelihoods are read from it.

    question: index of the question.  first: the position in ``tokens`` whose logits predict the first token of each
    answer.  answers: the place of each answer in its question, and its tokens.
    """

    question: int
    tokens: list[int]
    first: int
    answers: list[tuple[int, list[int]]] = field(default_factory=list)


@dataclass(frozen=True)
class Prefix:
    """Tokens that have been read already, with their states.

    length: number of tokens; 0 without a cache.  cache: the states of one row, of transformers; None: there are none.
    shared: every batch uses the cache itself, which no forward pass changes; otherwise each batch gets a copy.
    """

    length: int = 0
    cache: Any = None
    shared: bool = False

    def options(self, rows: int, device: torch.device) -> dict[str, Any]:
        """Return the options of a forward pass on ``rows`` rows that continue the prefix."""
        if self.cache is None:
            return {}
        if self.shared:
            return {"past_key_values": self.cache}
        copied = copy.deepcopy(self.cache)
        copied.reorder_cache(torch.zeros(rows, dtype=torch.long, device=device))  # repeats the one row
        return {"past_key_values": copied}


@dataclass(frozen=True)
class AnswerScorer:
    """Computes the log-likelihoods of the answers of one batch of questions at a time."""

    model: nn.Module
    questions: Sequence[Question]
    prefix: Prefix

    def __call__(self, batch: Sequence[int]) -> dict[int, list[float]]:
        """Return question index -> [log p(answer | context) of each answer], for the questions of a batch."""
        rows = [row for index in batch for row in question_rows(index, self.questions[index], self.prefix.length)]
        found = {index: [0.0] * len(self.questions[index].answers) for index in batch}
        options = self.prefix.options(len(rows), next(self.model.parameters()).device)
        for row, values in zip(rows, scores(self.model, rows, **options), strict=True):
            for (place, _), value in zip(row.answers, values, strict=True):
                found[row.question][place] = value
        return found


@torch.no_grad()
def log_likelihoods(
    model: nn.Module,
    questions: Sequence[Question],
    batch_size: int,
    done: Container[int] = (),
) -> Iterator[tuple[int, list[float]]]:
    """Yield (index, [log p(answer | context) of each answer]), ``batch_size`` questions at a time, longest first.

    With several processes, each one yields the results of its own batches.

    The tokens that all contexts begin with are read once. The rest of each context is read after their keys and values
    and padded on the right; causal attention ignores that padding, so positions need no correction.
    Questions in ``done`` are not yielded, but they are part of the batches, so the results of the others do not depend
    on them, not even in the last digits.
    Raises RunError: a log-likelihood is not finite. UsageError: not a causal model, or a token has no embedding.
    """
    kind = kind_of(model)
    if kind is not CAUSAL:
        raise UsageError(
            f"likelihoods need a causal model (model.type={CAUSAL.name}), but this one is of the type "
            f"{kind.name}: evaluate a causal model"
        )
    tokens = [row for question in questions for row in (question.context, *question.answers)]
    embedded(tokens, model.get_input_embeddings().num_embeddings)
    order = sorted(range(len(questions)), key=lambda index: -questions[index].length)
    if all(index in done for index in order):
        return
    beginning = shared_beginning(questions)
    with evaluating(model):
        scorer = AnswerScorer(model, questions, prefilled(model, beginning))
        for _, found in each_batch(order, batch_size, scorer, done, Processes.current()):
            yield from ((index, values) for index, values in found.items() if index not in done)


def question_rows(index: int, question: Question, read: int) -> list[Row]:
    """Return the fewest rows that contain every answer without its last token; single-token answers share one row.

    read: the number of tokens of the context that have been read already.
    """
    rest = question.context[read:]
    rows: list[Row] = []
    for place, answer in sorted(enumerate(question.answers), key=lambda answer: -len(answer[1])):
        needed = rest + answer[:-1]
        row = next((row for row in rows if row.tokens[: len(needed)] == needed), None)
        if row is None:
            row = Row(index, needed, len(rest) - 1)
            rows.append(row)
        row.answers.append((place, answer))
    return rows


def scores(model: nn.Module, rows: Sequence[Row], **options: Any) -> Iterator[list[float]]:
    """Yield for each row the log-likelihoods of its answers, summed over their tokens in fp32.

    options: of the forward pass.  Raises RunError: a log-likelihood is not finite.
    """
    longest = max(len(row.tokens) for row in rows)
    ids = torch.tensor([row.tokens + [0] * (longest - len(row.tokens)) for row in rows])
    places = sorted({place for row in rows for place in range(row.first, len(row.tokens))})
    logits = logits_at(model, ids, places, **options)  # (rows, places, vocabulary)
    column_of = {place: column for column, place in enumerate(places)}
    for row, line in zip(rows, logits, strict=True):
        columns = [column_of[place] for place in range(row.first, len(row.tokens))]
        log_p = line[columns].float().log_softmax(-1)
        values = [float(log_p[range(len(answer)), answer].sum()) for _, answer in row.answers]
        if not all(map(isfinite, values)):
            raise RunError(
                f"the model computes log-likelihoods that are not finite ({values}): try --dtype=fp32, or check the "
                "checkpoint"
            )
        yield values


def logits_at(model: nn.Module, ids: Tensor, places: list[int], **options: Any) -> Tensor:
    """Return the logits (rows, places, vocabulary); if the model supports it, only these are computed."""
    device = next(model.parameters()).device
    ids = ids.to(device)
    if keeps_logits(model):
        return model(input_ids=ids, logits_to_keep=torch.tensor(places, device=device), **options).logits
    return model(input_ids=ids, **options).logits[:, places]


def prefilled(model: nn.Module, tokens: list[int]) -> Prefix:
    """Read the tokens and return their states; without tokens or a cache, return an empty prefix.

    Keys and values are stored for one row only. Every layer joins them with those of a batch and stores nothing new. A
    cache with other states (recurrent layers) is copied for each batch.
    """
    if not tokens:
        return Prefix()
    device = next(model.parameters()).device
    few = {"logits_to_keep": 1} if keeps_logits(model) else {}
    output = model(input_ids=torch.tensor([tokens], device=device), use_cache=True, **few)
    cache = getattr(output, "past_key_values", None)
    if cache is None:
        return Prefix()
    shared = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
    if shared:
        for layer in cache.layers:
            layer.update = partial(joined, layer.keys, layer.values)
    return Prefix(len(tokens), cache, shared)


def joined(
    old_keys: Tensor, old_values: Tensor, keys: Tensor, values: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, Tensor]:
    """Return keys and values (rows, heads, prefix + length, size): the old ones, of one row, before the new ones."""
    rows = len(keys)
    return (
        torch.cat([old_keys.expand(rows, -1, -1, -1), keys], dim=-2),
        torch.cat([old_values.expand(rows, -1, -1, -1), values], dim=-2),
    )
