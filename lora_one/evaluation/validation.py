"""Validation along a run: the mean loss on held-out examples and, where they have a gold answer, exact match."""

from typing import Any

from torch import nn

from lora_one.config import RunConfig
from lora_one.data import Splits
from lora_one.data.encode import batches_of, pad_id_of, prompt_ids
from lora_one.distributed import Processes
from lora_one.evaluation.generate import Decoding, complete
from lora_one.evaluation.gsm8k import is_number, score, summarize
from lora_one.losses import mean_loss

GENERATION_BATCH = 8  # prompts at a time for one training micro-batch's memory


class Validation:
    """``validation(model)``: {eval_loss, eval_accuracy, eval_parsed}, the last two if accuracy_examples says so."""

    def __init__(self, run: RunConfig, splits: Splits, tokenizer: Any):
        self.batches = batches_of(splits.validation, run.model.per_device_batch_size, pad_id_of(tokenizer))
        self.reduction = run.model.loss
        texts = [example for example in splits.validation_texts if is_number(example.gold)]
        self.asked = texts[: run.dataset.accuracy_examples]
        self.prompts = (
            prompt_ids(tokenizer, [e.prompt for e in self.asked], chat=run.dataset.chat_template) if self.asked else []
        )
        self.tokenizer = tokenizer
        self.decoding = Decoding(run.dataset.max_new_tokens)
        self.generation_batch = max(GENERATION_BATCH, run.model.per_device_batch_size)

    def __bool__(self) -> bool:
        return bool(self.batches)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        metrics = {"eval_loss": mean_loss(model, self.batches, self.reduction)} if self.batches else {}
        if self.asked:
            completions = complete(model, self.tokenizer, self.prompts, self.decoding, self.generation_batch)
            share = [
                score(index, self.asked[index].prompt, completion.text, self.asked[index].gold)
                for index, completion in completions
            ]
            lines = [line for part in Processes.current().gathered(share) for line in part]
            shares, counts = summarize(lines)
            metrics |= {
                "eval_accuracy": shares["accuracy"],
                "eval_accuracy_stderr": shares["accuracy_stderr"],
                "eval_parsed": 1 - counts["unparsed"] / counts["total"],
            }
        return metrics
