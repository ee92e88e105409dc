"""The generated problems as a data set; the generator itself is arithmetic.py."""

from lora_one.config.schemas import ArithmeticConfig
from lora_one.data.arithmetic import FAMILIES, generate
from lora_one.data.gsm8k import example_of, rows_of
from lora_one.errors import UsageError, nearest
from lora_one.types import Example


def examples(config: ArithmeticConfig) -> list[Example]:
    """Distinct problems, train_size + validation_size of them, from ``data_seed`` alone; or rows of such a file.

    Raises UsageError: an unknown family, or fewer problems in it than wanted.
    """
    if config.path is not None:
        return rows_of(config.path, "train")
    for family in config.families:
        if family not in FAMILIES:
            raise UsageError(f"dataset.families: {family} is not a family of problems; {nearest(family, FAMILIES)}")
    try:
        rows = generate(config.families, config.train_size + int(config.validation_size), config.data_seed)
    except ValueError as error:
        raise UsageError(f"dataset.families={config.families}: {error}") from error
    return [example_of(row) for row in rows]
