"""Validation along a run: the mean loss on held-out examples and, where it has a meaning, the accuracy."""

import math
from typing import Any

from torch import Tensor, nn

from lora_one.config import RunConfig
from lora_one.data import Splits, labels_of
from lora_one.data.encode import Encoder, batches_of
from lora_one.distributed import Processes
from lora_one.evaluation import glue, gsm8k
from lora_one.evaluation.generate import Decoding, complete
from lora_one.evaluation.shares import share_of
from lora_one.losses import Batch, mean_loss

GENERATION_BATCH = 8  # prompts at a time for one training micro-batch's memory


class Validation:
    """``validation(model)``: {eval_loss, eval_accuracy, eval_parsed}.

    Accuracy is that of a classification head on every example; else of completions, where accuracy_examples asks for
    them and the answer is a number or the word of a class.
    """

    def __init__(self, run: RunConfig, splits: Splits, encoder: Encoder):
        self.batches = batches_of(splits.validation, run.model.per_device_batch_size, encoder.pad_id)
        self.reduction = run.model.loss
        self.head = run.model.type == "SequenceClassification"
        words = labels_of(run.dataset.name) is not None
        self.benchmark = glue if words else gsm8k
        answerable = [example for example in splits.validation_texts if words or gsm8k.is_number(example.gold)]
        self.asked = [] if self.head else answerable[: run.dataset.accuracy_examples]
        self.prompts = encoder.prompts(self.asked)
        self.dataset, self.tokenizer = run.dataset.name, encoder.tokenizer
        self.decoding = Decoding(run.dataset.max_new_tokens)
        self.generation_batch = max(GENERATION_BATCH, run.model.per_device_batch_size)

    def __bool__(self) -> bool:
        return bool(self.batches)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        metrics: dict[str, Any] = {}
        if self.batches:
            hits: list[bool] = []

            def count(logits: Tensor, batch: Batch) -> None:
                if self.head:
                    hits.extend((logits.argmax(-1) == batch["labels"].to(logits.device)).tolist())

            metrics["eval_loss"] = mean_loss(model, self.batches, self.reduction, count)
            if self.head:
                metrics["eval_accuracy"], metrics["eval_accuracy_stderr"] = share_of(hits)
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
