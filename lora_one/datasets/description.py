"""The description of a data set: all facts about it in one object."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from lora_one.datasets.classification import Task
from lora_one.datasets.settings import DatasetConfig
from lora_one.types import Example

Rows = Callable[[Any], Iterable[Example]]  # takes the settings of the data set


@dataclass(frozen=True)
class DataSet:
    """All facts about a data set that other modules need.

    train: returns the training examples, as a list or one by one.  validation: returns the examples of the set's own
    validation split; None: it has none, so validation examples are held out of the training split.
    settings: the class of its settings.
    labels: the words of the classes, by index; None: not a classification set. With labels, a generated answer is
    correct if it is the word of the example's class; without labels, if its final number is the right one.
    evaluation: the benchmark that scores a model trained on this data set, with its options; None: there is none.
    nested: a local path is a folder with a subfolder for each part; the fingerprint includes their contents.
    generated: the rows are generated on this machine, so nothing is downloaded.
    conversations: the examples have ``messages``, which the tokenizer's chat template encodes.
    """

    train: Rows
    validation: Rows | None = None
    settings: type[DatasetConfig] = DatasetConfig
    labels: tuple[str, ...] | None = None
    evaluation: str | None = None
    nested: bool = False
    generated: bool = False
    conversations: bool = False

    @property
    def accuracy_name(self) -> str:
        """Return what the accuracy is called: the set has classes, or answers that are compared as text."""
        return "accuracy" if self.labels else "exact match"

    @classmethod
    def of_classes(cls, task: Task, evaluation: str | None = None) -> "DataSet":
        """Describe a classification set."""
        validation = task.validation if task.held_out else None
        return cls(task.train, validation, labels=task.labels, evaluation=evaluation)
