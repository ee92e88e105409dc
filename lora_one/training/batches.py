"""Micro-batches for training, with the counts that the loss and the logs need."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lora_one.data.encode import Encoded, collate, pack
from lora_one.losses import IGNORED, counted_in

COUNTED, TOKENS = "counted", "tokens"  # extra keys of a batch: the positions with a loss, the number of tokens


@dataclass(frozen=True)
class Collator:
    """Collate encoded examples into a micro-batch, on the CPU.

    filler: the example used, without labels, if a process has no example left in a global batch.
    reduction: the mean that the loss is, over "token" or "example".
    """

    filler: Encoded
    pad_id: int
    packing: bool
    reduction: str

    def __call__(self, batch: Sequence[Encoded]) -> dict[str, Any]:
        examples = list(batch) or [self.filler]
        tensors = pack(examples) if self.packing else collate(examples, self.pad_id)
        if not batch:
            tensors["labels"] = torch.full_like(tensors["labels"], IGNORED)
        return tensors | {
            COUNTED: counted_in(tensors, self.reduction),
            TOKENS: sum(example.tokens for example in batch),
        }
