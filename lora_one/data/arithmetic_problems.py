"""The generated problems as a data set; the generator itself is arithmetic.py."""

from lora_one.config import ArithmeticConfig
from lora_one.data.arithmetic import generate
from lora_one.data.gsm8k import example_of
from lora_one.types import Example


def examples(config: ArithmeticConfig) -> list[Example]:
    """Distinct problems, train_size + validation_size of them, from ``data_seed`` alone."""
    rows = generate(config.families, config.train_size + config.validation_size, config.data_seed)
    return [example_of(row) for row in rows]
