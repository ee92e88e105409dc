"""The settings that every data set reads."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DatasetConfig:
    """Where examples come from. Sizes count examples; null means all there are."""

    name: str
    path: str | None  # local file or folder instead of the hub
    max_train_samples: int | None
    max_eval_samples: int | None
    train_size: int | None  # the published sizes; smaller sources are split in the same proportion
    validation_size: float | None  # below 1 a share of all; null = the set's own validation split, if it has one
    max_tokens: int | None  # longer examples (prompt and response) are left out
    shuffle_seed: int | None  # null keeps the file's order
    chat_template: bool
    accuracy_examples: int  # exact match on so many validation examples along the run; 0 = none
    max_new_tokens: int  # for those
    decontaminate: Any  # evaluations whose questions no training row may contain: see questions.evaluations_in
    cache: str | None  # a folder of large sets encoded before, see data.encoded_cache; null = encode anew each time

    def check(self) -> None:
        """Check what only this data set requires. Raises UsageError."""
