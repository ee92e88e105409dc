"""Micro-batches of the training, with what the loss and the record need to know of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lora_one.data.encode import Encoded, collate, pack
from lora_one.losses import IGNORED, counted_of, targets

COUNTED, TOKENS = "counted", "tokens"  # keys next to a batch's tensors: the places that count, the number of tokens


@dataclass(frozen=True)
class Collator:
    """Makes a micro-batch of encoded examples, on the CPU.

    filler: the example used, with no label, where a process has no example left in a global batch.
    reduction: "token" or "example", what the loss is a mean over.
    """

    filler: Encoded
    pad_id: int
    packing: bool
    reduction: str

    def __call__(self, batch: Sequence[Encoded]) -> dict[str, Any]:
        whole = list(batch) or [self.filler]
        tensors = pack(whole) if self.packing else collate(whole, self.pad_id)
        if not batch:
            tensors["labels"] = torch.full_like(tensors["labels"], IGNORED)
        counted = counted_of(targets(tensors), self.reduction, tensors.get("position_ids"))
        return tensors | {COUNTED: counted, TOKENS: sum(example.tokens for example in batch)}
