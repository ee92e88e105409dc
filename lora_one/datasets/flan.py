"""FLAN and FLAN v2: too large to download, so the first rows of the stream are read."""

from collections.abc import Iterator

from lora_one.datasets.instruct import PROMPT
from lora_one.datasets.settings import StreamedConfig
from lora_one.datasets.sources import Hub, each_row
from lora_one.types import Example


def flan(config: StreamedConfig) -> Iterator[Example]:
    return first_rows(("Muennighoff/flan", None), config, PROMPT)


def flan_v2(config: StreamedConfig) -> Iterator[Example]:
    return first_rows(("SirNeural/flan_v2", None), config, "{instruction}")


def first_rows(hub: Hub, config: StreamedConfig, prompt: str) -> Iterator[Example]:
    for row in each_row(hub, config.path, "train", ["inputs", "targets"], first=config.rows):
        yield Example(prompt.format(instruction=row["inputs"]), row["targets"])
