"""Validation during a run: the mean loss on held-out examples and, if the examples have gold answers, the accuracy."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from typing import Any, Literal

import torch
from torch import nn

from lora_one.config import RunConfig
from lora_one.data import Splits
from lora_one.data.encode import Encoded, Encoder, collate
from lora_one.data.encoded_cache import lengths_of
from lora_one.datasets import labels_of
from lora_one.distributed import Processes
from lora_one.errors import UsageError
from lora_one.evaluation import gsm8k
from lora_one.evaluation.batches import automatic_tokens, each_that_fits
from lora_one.evaluation.benchmark import Prediction
from lora_one.evaluation.decoding import Completion, Decoding
from lora_one.evaluation.generate import complete
from lora_one.evaluation.scoring import class_line, prediction_line
from lora_one.losses import IGNORED, batch_loss, evaluating
from lora_one.progress import progress
from lora_one.statistics.shares import share_of
from lora_one.types import Example

GENERATION_BATCH = 8  # prompts in a batch; they need about the memory of a micro-batch in training


@dataclass(frozen=True)
class Measured:
    """Sum and number of the losses of some examples; hits: for a head, whether each example's class is right."""

    total: float
    count: int
    hits: list[bool]
    examples: int


class Validation:
    """Measures {eval_loss, eval_accuracy, eval_accuracy_n, eval_parsed} of a model, the same on all processes.

    The examples are divided among the processes. Batches are sorted by length, and their size depends on the memory;
    this changes the loss only by rounding.
    The accuracy of a classification head is measured on all examples. That of generated answers is measured on the
    first dataset.accuracy_examples examples that can be scored: with the word of a class, or see ``form_of``.
    Raises UsageError: an accuracy is wanted, but no validation example can be scored.
    """

    def __init__(self, run: RunConfig, splits: Splits, encoder: Encoder):
        self.examples, self.pad_id = splits.validation, encoder.pad_id
        self.lengths = lengths_of(self.examples)
        self.sharded, self.micro_batch = run.model.sharded, run.model.per_device_batch_size
        self.reduction = run.model.loss
        self.head = run.model.kind.has_head
        self.labels = labels_of(run.dataset.name)
        scorable = (text for text in splits.validation_texts if self.labels or form_of(text))
        self.asked = [] if self.head else list(islice(scorable, run.dataset.accuracy_examples))
        if run.dataset.accuracy_examples and splits.validation_texts and not (self.asked or self.head):
            raise nothing_scorable(run, splits.validation_texts)
        self.prompts = encoder.prompts(self.asked)
        self.dataset, self.tokenizer = run.dataset.name, encoder.tokenizer
        self.decoding = Decoding(run.dataset.max_new_tokens, stop=encoder.stop)
        self.generation_batch = max(GENERATION_BATCH, run.model.per_device_batch_size)

    def __bool__(self) -> bool:
        return bool(self.examples)

    @cached_property
    def content(self) -> str:
        """Return the sha256 of all that the metrics depend on besides the model."""
        total = hashlib.sha256()
        for example in self.examples:
            total.update(json.dumps(asdict(example)).encode() + b"\n")
        asked = [self.dataset, self.labels, self.prompts, [(example.gold, form_of(example)) for example in self.asked]]
        decoding = [asdict(self.decoding), self.generation_batch]
        total.update(json.dumps([asked, decoding, self.reduction, self.head]).encode())
        return total.hexdigest()

    def __call__(self, model: nn.Module) -> dict[str, float]:
        metrics: dict[str, Any] = self.loss(model) if self.examples else {}
        if self.asked and math.isfinite(metrics.get("eval_loss", 0.0)):  # a diverged model cannot generate text
            share = []
            with progress("validation, answers", self.mine(self.asked), "examples") as shown:
                completions = complete(model, self.tokenizer, self.prompts, self.decoding, self.generation_batch)
                for index, completion in completions:
                    share.append(self.scored(index, completion))
                    shown.advance()
            lines = [line for part in Processes.current().gathered(share) for line in part]
            metrics["eval_accuracy"], metrics["eval_accuracy_stderr"] = share_of([line["correct"] for line in lines])
            metrics["eval_accuracy_n"] = len(lines)
            metrics["eval_parsed"] = sum(line["prediction"] is not None for line in lines) / len(lines)
        return metrics

    def scored(self, index: int, completion: Completion) -> Prediction:
        """Score a generated answer: by the word of its class if the data set has classes, else in its own form."""
        example = self.asked[index]
        line = (f"{self.dataset}/{index}", "", completion.text, example.gold)
        if self.labels is not None:
            return class_line(*line, self.labels)
        if form_of(example) == "number":
            return gsm8k.GSM8K().score(*line)
        answer = completion.text.strip()
        return prediction_line(*line, answer, correct=answer == example.gold)

    @torch.no_grad()
    def loss(self, model: nn.Module) -> dict[str, float]:
        """Return the mean loss over all examples and, for a head, the accuracy."""
        mine = []
        with evaluating(model), progress("validation", self.mine(self.examples), "examples") as shown:
            for part in self.in_step(model) if self.sharded else self.by_memory(model):
                mine.append(part)
                shown.advance(part.examples)
        parts = [part for share in Processes.current().gathered(mine) for part in share]
        metrics = {"eval_loss": sum(part.total for part in parts) / sum(part.count for part in parts)}
        if self.head:
            hits = [hit for part in parts for hit in part.hits]
            metrics["eval_accuracy"], metrics["eval_accuracy_stderr"] = share_of(hits)
            metrics["eval_accuracy_n"] = len(hits)
        return metrics

    def mine(self, examples: Sequence[Any]) -> int:
        """Return about how many of these examples this process handles."""
        return -(-len(examples) // Processes.current().count)

    def by_memory(self, model: nn.Module) -> Iterator[Measured]:
        """Yield the losses of this process's share, in batches as large as the memory allows."""
        processes = Processes.current()
        outputs = 1 if self.head else model.config.get_text_config().vocab_size
        return each_that_fits(
            self.longest_first()[processes.rank :: processes.count],
            self.lengths,
            automatic_tokens(model, outputs),
            lambda chosen: self.measured(model, [self.examples[index] for index in chosen]),
        )

    def in_step(self, model: nn.Module) -> Iterator[Measured]:
        """Yield the losses of this process's share for a sharded model, whose passes all processes must run together.

        Every process runs the same number of passes, with the micro-batches of training. Examples that only fill up a
        process's share have no labels.
        """
        share = list(Processes.current().share(self.longest_first()))
        mine = [self.examples[index] if weight else without_labels(self.examples[index]) for index, weight in share]
        for start in range(0, len(mine), self.micro_batch):
            yield self.measured(model, mine[start : start + self.micro_batch])

    def longest_first(self) -> list[int]:
        """Return the indices of all examples, the longest first."""
        return self.lengths.argsort(descending=True, stable=True).tolist()

    def measured(self, model: nn.Module, examples: Sequence[Encoded]) -> Measured:
        """Run one forward pass on a batch of examples."""
        batch = collate(examples, self.pad_id)
        loss, count, logits = batch_loss(model, batch, self.reduction)
        hits: list[bool] = []
        if self.head:
            labels = batch["labels"]
            hits = (logits.argmax(-1).cpu() == labels)[labels != IGNORED].tolist()
        return Measured(float(loss), count, hits, len(examples))


def form_of(example: Example) -> Literal["number", "text"] | None:
    """Return the form in which answers to an example are scored, the one in which its own response is right.

    number: the number after ``####`` or ``The answer is``.  text: the whole answer, without spaces around it.
    None: the example has no gold answer, or its own response would be scored as wrong.
    """
    if example.gold is None:
        return None
    if gsm8k.is_number(example.gold) and gsm8k.parse(example.response) == gsm8k.parse(f"#### {example.gold}"):
        return "number"
    return "text" if example.gold and example.response.strip() == example.gold else None


def nothing_scorable(run: RunConfig, examples: Sequence[Example]) -> UsageError:
    """Return the error to raise if an accuracy is wanted and no example can be scored."""
    unset = getattr(run.dataset, "answer", "none") is None
    column = "dataset.answer=<column of the gold answers>, " if unset else ""
    differing = next((example for example in examples if example.gold is not None), None)
    shown = f" (not so: {differing.response[-40:]!r} and {differing.gold[:40]!r})" if differing else ""
    return UsageError(
        f"dataset.accuracy_examples={run.dataset.accuracy_examples}: none of the {len(examples)} validation examples "
        "can be scored. A response must end in its gold answer as '#### <number>' or 'The answer is <number>', or be "
        f"equal to the gold answer{shown}: set {column}dataset.accuracy_examples=0, or change the responses"
    )


def without_labels(example: Encoded) -> Encoded:
    """Return the example with ignored labels, so it does not count in the loss."""
    labels = IGNORED if isinstance(example.labels, int) else [IGNORED] * len(example.labels)
    return dataclasses.replace(example, labels=labels)
