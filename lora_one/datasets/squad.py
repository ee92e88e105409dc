"""SQuAD: a question, its context, and the answers, which are parts of the context."""

from typing import Any

from lora_one.datasets.settings import DatasetConfig
from lora_one.datasets.sources import read_rows
from lora_one.errors import UsageError
from lora_one.types import Example

SOURCE = ("rajpurkar/squad", None)
PROMPT = "answer the question: {question}\ncontext: {context}\nresult: "


def example_of(row: dict[str, Any], where: str) -> Example:
    """Return a row's example. Raises UsageError: ``answers`` does not have the hub's form."""
    answers = row["answers"]
    if not isinstance(answers, dict) or not isinstance(answers.get("text"), list):
        raise UsageError(f'{where}: column answers must be {{"text": [...]}} as on the hub, got {answers!r:.60}')
    return Example(PROMPT.format(**row), ", ".join(answers["text"]))


def train(config: DatasetConfig) -> list[Example]:
    return read_split(config.path, "train")


def validation(config: DatasetConfig) -> list[Example]:
    return read_split(config.path, "validation")


def read_split(path: str | None, split: str) -> list[Example]:
    rows = read_rows(SOURCE, path, split, ["question", "context"], nested=["answers"])
    where = f"{path or SOURCE[0]}, {split} row"
    return [example_of(row, f"{where} {number}") for number, row in enumerate(rows, start=1)]
