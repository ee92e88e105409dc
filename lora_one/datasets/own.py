"""Your own data: two columns of a local file, named in the configuration."""

from dataclasses import dataclass

from lora_one.datasets.settings import DatasetConfig
from lora_one.datasets.sources import read_rows
from lora_one.errors import UsageError
from lora_one.types import Example


@dataclass(frozen=True)
class OwnDataConfig(DatasetConfig):
    prompt: str  # column names
    response: str

    def check(self) -> None:
        """Check that a local file is set. Raises UsageError: there is none."""
        if self.path is None:
            raise UsageError(f"dataset={self.name} needs a local file: add dataset.path=<file.jsonl>")


def own_rows(config: OwnDataConfig) -> list[Example]:
    """Return the examples of all rows; the encoding drops and counts those with an empty prompt or response."""
    rows = read_rows(None, config.path, "train", [config.prompt, config.response])
    return [Example(row[config.prompt], row[config.response]) for row in rows]
