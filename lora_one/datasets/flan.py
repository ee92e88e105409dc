"""FLAN and FLAN v2: too large to download, so the first rows of the stream are read."""

from dataclasses import dataclass

from lora_one.datasets.instruct import PROMPT
from lora_one.datasets.settings import DatasetConfig
from lora_one.datasets.sources import Hub, read_rows
from lora_one.types import Example


@dataclass(frozen=True)
class StreamedConfig(DatasetConfig):
    rows: int  # number of rows to read from the start of the stream


def flan(config: StreamedConfig) -> list[Example]:
    return first_rows(("Muennighoff/flan", None), config, PROMPT)


def flan_v2(config: StreamedConfig) -> list[Example]:
    return first_rows(("SirNeural/flan_v2", None), config, "{instruction}")


def first_rows(hub: Hub, config: StreamedConfig, prompt: str) -> list[Example]:
    rows = read_rows(hub, config.path, "train", ["inputs", "targets"], first=config.rows)
    return [Example(prompt.format(instruction=row["inputs"]), row["targets"]) for row in rows]
