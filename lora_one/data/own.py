"""One's own rows: two columns named in the configuration."""

from lora_one.config.schemas import OwnDataConfig
from lora_one.data.sources import read_rows
from lora_one.types import Example


def examples(config: OwnDataConfig) -> list[Example]:
    """Rows with an empty prompt or response are kept here and counted by the encoding."""
    rows = read_rows(None, config.path, "train", [config.prompt, config.response])
    return [Example(row[config.prompt], row[config.response]) for row in rows]
