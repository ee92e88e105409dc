"""Validation along a run: the mean loss on held-out examples and, where it has a meaning, the accuracy."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_one.config import RunConfig
from lora_one.data import Splits
from lora_one.data.encode import Encoded, Encoder, collate
from lora_one.datasets import labels_of
from lora_one.distributed import Processes
from lora_one.evaluation import glue, gsm8k
from lora_one.evaluation.batches import automatic_tokens, each_that_fits
from lora_one.evaluation.generate import Decoding, complete
from lora_one.evaluation.shares import share_of
from lora_one.losses import IGNORED, batch_loss, evaluating

GENERATION_BATCH = 8  # prompts at a time for one training micro-batch's memory


@dataclass(frozen=True)
class Measured:
    """Sum of losses and their number over some examples; hits: of a head, whether each example's class was found."""

    total: float
    count: int
    hits: list[bool]


class Validation:
    """``validation(model)``: {eval_loss, eval_accuracy, eval_parsed}, the same on every process.

    Several processes share the examples out. Batches are sorted by length, and memory decides how many examples they
    hold; neither changes the loss by more than rounding.
    Accuracy is that of a classification head on every example; else of completions, where accuracy_examples asks for
    them and the answer is a number or the word of a class.
    """

    def __init__(self, run: RunConfig, splits: Splits, encoder: Encoder):
        self.examples, self.pad_id = splits.validation, encoder.pad_id
        self.lengths = [example.tokens for example in self.examples]
        self.sharded, self.micro_batch = run.model.sharded, run.model.per_device_batch_size
        self.reduction = run.model.loss
        self.head = run.model.kind.has_head
        words = labels_of(run.dataset.name) is not None
        self.benchmark = glue.Glue() if words else gsm8k.GSM8K()
        answerable = [example for example in splits.validation_texts if words or gsm8k.is_number(example.gold)]
        self.asked = [] if self.head else answerable[: run.dataset.accuracy_examples]
        self.prompts = encoder.prompts(self.asked)
        self.dataset, self.tokenizer = run.dataset.name, encoder.tokenizer
        self.decoding = Decoding(run.dataset.max_new_tokens)
        self.generation_batch = max(GENERATION_BATCH, run.model.per_device_batch_size)

    def __bool__(self) -> bool:
        return bool(self.examples)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        metrics: dict[str, Any] = self.loss(model) if self.examples else {}
        if self.asked and math.isfinite(metrics.get("eval_loss", 0.0)):  # a model that has diverged writes nothing
            completions = complete(model, self.tokenizer, self.prompts, self.decoding, self.generation_batch)
            share = [
                self.benchmark.score(f"{self.dataset}/{index}", "", completion.text, self.asked[index].gold)
                for index, completion in completions
            ]
            lines = [line for part in Processes.current().gathered(share) for line in part]
            metrics["eval_accuracy"], metrics["eval_accuracy_stderr"] = share_of([line["correct"] for line in lines])
            metrics["eval_parsed"] = sum(line["prediction"] is not None for line in lines) / len(lines)
        return metrics

    @torch.no_grad()
    def loss(self, model: nn.Module) -> dict[str, float]:
        """The mean loss over all examples and, of a head, its accuracy."""
        with evaluating(model):
            mine = list(self.in_step(model) if self.sharded else self.by_memory(model))
        parts = [part for share in Processes.current().gathered(mine) for part in share]
        metrics = {"eval_loss": sum(part.total for part in parts) / sum(part.count for part in parts)}
        if self.head:
            hits = [hit for part in parts for hit in part.hits]
            metrics["eval_accuracy"], metrics["eval_accuracy_stderr"] = share_of(hits)
        return metrics

    def by_memory(self, model: nn.Module) -> Iterator[Measured]:
        """This process's share, in batches as large as memory holds."""
        processes = Processes.current()
        outputs = 1 if self.head else model.config.get_text_config().vocab_size
        return each_that_fits(
            self.longest_first()[processes.rank :: processes.count],
            self.lengths,
            automatic_tokens(model, outputs),
            lambda chosen: self.measured(model, [self.examples[index] for index in chosen]),
        )

    def in_step(self, model: nn.Module) -> Iterator[Measured]:
        """This process's share of a sharded model's work, whose passes all processes must do together.

        Every process does as many passes, of micro-batches that training holds; an example too many counts for nothing.
        """
        share = list(Processes.current().share(self.longest_first()))
        mine = [self.examples[index] if weight else nothing_counts(self.examples[index]) for index, weight in share]
        for start in range(0, len(mine), self.micro_batch):
            yield self.measured(model, mine[start : start + self.micro_batch])

    def longest_first(self) -> list[int]:
        return sorted(range(len(self.examples)), key=lambda index: -self.lengths[index])

    def measured(self, model: nn.Module, examples: Sequence[Encoded]) -> Measured:
        batch = collate(examples, self.pad_id)
        loss, count, logits = batch_loss(model, batch, self.reduction)
        hits: list[bool] = []
        if self.head:
            labels = batch["labels"]
            hits = (logits.argmax(-1).cpu() == labels)[labels != IGNORED].tolist()
        return Measured(float(loss), count, hits)


def nothing_counts(example: Encoded) -> Encoded:
    """The same input without anything to predict."""
    labels = IGNORED if isinstance(example.labels, int) else [IGNORED] * len(example.labels)
    return dataclasses.replace(example, labels=labels)
