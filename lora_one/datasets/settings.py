"""The settings that all data sets share."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DatasetConfig:
    """The source of examples and their selection. Sizes are numbers of examples; null means all."""

    name: str
    path: str | None  # local file or folder instead of the hub
    max_train_samples: int | None
    max_eval_samples: int | None
    train_size: int | None  # a smaller source is split in the same proportion as train_size and validation_size
    validation_size: float | None  # below 1: a fraction of all; null = the set's own validation split, if it has one
    max_tokens: int | None  # longer examples (prompt and response) are removed
    shuffle_seed: int | None  # null = the order of the file
    chat_template: bool
    train_on_inputs: bool  # the tokens of the prompt have a loss too
    accuracy_examples: int  # number of validation examples for exact match during the run; 0 = none
    max_new_tokens: int  # of each answer generated for exact match
    decontaminate: Any  # evaluations; training rows that contain their questions are removed, see questions.py
    cache: str | None  # folder for encoded large sets, see data/encoded_cache.py; null = encode again in each run

    def check(self) -> None:
        """Check the rules of this data set. Raises UsageError: one is broken."""


@dataclass(frozen=True)
class StreamedConfig(DatasetConfig):
    """The settings of a data set of the hub that can be streamed."""

    rows: int | None  # first rows to read; from the hub they are streamed, without the rest; null = all
