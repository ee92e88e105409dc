"""Instructions and answers in the Alpaca template: Alpaca, its GPT-4 version, and WizardLM."""

from collections.abc import Iterator

from lora_one.datasets.settings import StreamedConfig
from lora_one.datasets.sources import Hub, each_row
from lora_one.types import Example

PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
PROMPT_WITH_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
"""The published template for rows with an input; it has no opening sentence."""

REFUSALS = ("sorry", "as an ai")


def alpaca(config: StreamedConfig) -> Iterator[Example]:
    return alpaca_rows(("yahma/alpaca-cleaned", None), config)


def alpaca_gpt4(config: StreamedConfig) -> Iterator[Example]:
    return alpaca_rows(("vicgalle/alpaca-gpt4", None), config)


def alpaca_rows(hub: Hub, config: StreamedConfig) -> Iterator[Example]:
    for row in each_row(hub, config.path, "train", ["instruction", "input", "output"], first=config.rows):
        yield Example((PROMPT_WITH_INPUT if row["input"] else PROMPT).format(**row), row["output"])


def wizard_lm(config: StreamedConfig) -> Iterator[Example]:
    """Yield the rows whose answer is not a refusal."""
    hub = ("silk-road/Wizard-LM-Chinese-instruct-evol", None)
    for row in each_row(hub, config.path, "train", ["instruction", "output"], first=config.rows):
        if not any(word in row["output"].lower() for word in REFUSALS):
            yield Example(PROMPT.format(**row), row["output"])
