"""FLAN and FLAN v2: far too large to download, so the first rows of the stream are taken."""

from lora_one.config.schemas import StreamedConfig
from lora_one.data.instruct import PROMPT
from lora_one.data.sources import Hub, read_rows
from lora_one.types import Example


def flan(config: StreamedConfig) -> list[Example]:
    return rows_of(("Muennighoff/flan", None), config, PROMPT)


def flan_v2(config: StreamedConfig) -> list[Example]:
    return rows_of(("SirNeural/flan_v2", None), config, "{instruction}")


def rows_of(hub: Hub, config: StreamedConfig, prompt: str) -> list[Example]:
    rows = read_rows(hub, config.path, "train", ["inputs", "targets"], first=config.rows)
    return [Example(prompt.format(instruction=row["inputs"]), row["targets"]) for row in rows]
