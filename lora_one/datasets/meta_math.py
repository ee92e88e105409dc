"""MetaMathQA, whole or only its GSM8K part.

Responses are cut before "The answer is:"; those of the GSM8K part then end in ``#### <number>``.
"""

from collections.abc import Iterator
from typing import Any

from lora_one.datasets.gsm8k import PROMPT, gold_of
from lora_one.datasets.settings import StreamedConfig
from lora_one.datasets.sources import each_row
from lora_one.types import Example

SOURCE = ("meta-math/MetaMathQA", None)
END = "\nThe answer is:"


def example_of(row: dict[str, Any]) -> Example | None:
    """Return a row's example; None: the row is not derived from GSM8K."""
    return any_example_of(row) if "GSM" in row["type"] else None


def any_example_of(row: dict[str, Any]) -> Example:
    response = row["response"].split(END)[0]
    return Example(PROMPT.format(question=row["query"]), response, gold_of(response))


def gsm8k_part(config: StreamedConfig) -> Iterator[Example]:
    for row in each_row(SOURCE, config.path, "train", ["query", "response", "type"], first=config.rows):
        if (example := example_of(row)) is not None:
            yield example


def whole(config: StreamedConfig) -> Iterator[Example]:
    """Yield all rows, including those derived from MATH, whose responses have no ``####``."""
    for row in each_row(SOURCE, config.path, "train", ["query", "response"], first=config.rows):
        yield any_example_of(row)
