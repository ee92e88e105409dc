"""GSM8K: grade-school word problems whose answer ends in ``#### <number>``."""

from typing import Any

from lora_one.datasets.settings import DatasetConfig
from lora_one.datasets.sources import read_rows
from lora_one.types import Example

SOURCE = ("openai/gsm8k", "main")
PROMPT = "Q: {question}\nA: "


def example_of(row: dict[str, Any]) -> Example:
    return Example(PROMPT.format(question=row["question"]), row["answer"], gold_of(row["answer"]))


def gold_of(answer: str) -> str | None:
    """Return the text after the last ``####``; None: there is no ``####``."""
    _, marker, gold = answer.rpartition("####")
    return gold.strip() if marker else None


def train(config: DatasetConfig) -> list[Example]:
    """Return the training split; validation examples are held out of it, the test split is only for evaluation."""
    return read_problems(config.path, "train")


def read_problems(path: str | None, split: str) -> list[Example]:
    """Return the examples of a split, from a local file or folder or (path None) from the hub."""
    return [example_of(row) for row in read_rows(SOURCE, path, split, ["question", "answer"])]
