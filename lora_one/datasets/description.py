"""The facts of one data set in one object."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lora_one.datasets.classification import Task
from lora_one.datasets.settings import DatasetConfig
from lora_one.types import Example

Rows = Callable[[Any], list[Example]]  # takes the settings of the data set


@dataclass(frozen=True)
class DataSet:
    """Everything about a data set that other rooms ask for.

    train: the training rows.  validation: the rows of the set's own validation split; None: it has none, and
    validation examples are held out of train.  settings: the class of its settings.
    labels: the words of the classes, by index; None: the answers are texts. With labels a written answer is scored by
    its word, without by its final number.
    evaluation: arguments of the script in eval/ that scores a model on this kind of data.
    nested: a local path is a folder with a folder for each part, whose contents belong to the fingerprint.
    generated: rows are made on this machine, so nothing is downloaded.
    """

    train: Rows
    validation: Rows | None = None
    settings: type[DatasetConfig] = DatasetConfig
    labels: tuple[str, ...] | None = None
    evaluation: str = "eval_gsm8k.py"
    nested: bool = False
    generated: bool = False

    @classmethod
    def of_classes(cls, task: Task, evaluation: str = "eval_gsm8k.py") -> "DataSet":
        """Describe a classification set."""
        validation = task.validation if task.held_out else None
        return cls(task.train, validation, labels=task.labels, evaluation=evaluation)
