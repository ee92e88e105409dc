"""The generated problems as a data set; the generator is in arithmetic.py."""

from dataclasses import dataclass

from lora_one.datasets.arithmetic import FAMILIES, generate
from lora_one.datasets.gsm8k import example_of, read_problems
from lora_one.datasets.settings import DatasetConfig
from lora_one.errors import UsageError, nearest
from lora_one.types import Example


@dataclass(frozen=True)
class ArithmeticConfig(DatasetConfig):
    families: list[str]
    data_seed: int  # of the generated problems

    def check(self) -> None:
        """Check the numbers of problems to generate. Raises UsageError: one is missing."""
        for key in ("train_size", "validation_size"):
            size = getattr(self, key)
            if self.path is None and (size is None or size < 1):
                shown = "null" if size is None else size
                raise UsageError(
                    f"dataset.{key}={shown}: the number of problems to generate is missing: set "
                    f"dataset.{key}=<number of examples>"
                )


def problems(config: ArithmeticConfig) -> list[Example]:
    """Return train_size + validation_size different problems, drawn with ``data_seed``, or the rows of ``path``.

    Raises UsageError: an unknown family, or more problems than a family has.
    """
    if config.path is not None:
        return read_problems(config.path, "train")
    for family in config.families:
        if family not in FAMILIES:
            raise UsageError(f"dataset.families: {family} is not a family of problems: {nearest(family, FAMILIES)}")
    try:
        rows = generate(config.families, config.train_size + int(config.validation_size), config.data_seed)
    except ValueError as error:
        raise UsageError(f"dataset.families={config.families}: {error}") from error
    return [example_of(row) for row in rows]
