"""Your own data: two columns of a local file, named in the configuration."""

from collections.abc import Iterator
from dataclasses import dataclass

from lora_one.datasets.gsm8k import gold_of
from lora_one.datasets.settings import DatasetConfig
from lora_one.datasets.sources import each_row
from lora_one.errors import UsageError
from lora_one.types import Example


@dataclass(frozen=True)
class LocalConfig(DatasetConfig):
    """The settings of a data set that has no source on the hub."""

    def check(self) -> None:
        """Check that a local file is set. Raises UsageError: there is none."""
        if self.path is None:
            raise UsageError(f"dataset={self.name} needs a local file: add dataset.path=<file.jsonl>")


@dataclass(frozen=True)
class OwnDataConfig(LocalConfig):
    prompt: str  # column names
    response: str
    answer: str | None  # column of the gold answers; null = the text after #### in the response


def own_rows(config: OwnDataConfig) -> Iterator[Example]:
    """Yield the examples of all rows; the encoding drops and counts those with an empty prompt or response."""
    columns = [config.prompt, config.response, *([config.answer] if config.answer else [])]
    for row in each_row(None, config.path, "train", columns):
        yield Example(
            row[config.prompt],
            row[config.response],
            row[config.answer].strip() if config.answer else gold_of(row[config.response]),
        )
