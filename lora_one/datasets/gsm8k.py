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
    """The text behind the last ``####``; None where there is none."""
    _, marker, gold = answer.rpartition("####")
    return gold.strip() if marker else None


def train(config: DatasetConfig) -> list[Example]:
    """The train split; validation is held out of it, the test split belongs to the evaluation alone."""
    return read_problems(config.path, "train")


def read_problems(path: str | None, split: str) -> list[Example]:
    """Examples of a split, of a local file or folder or (path None) of the hub."""
    return [example_of(row) for row in read_rows(SOURCE, path, split, ["question", "answer"])]
