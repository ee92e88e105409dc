"""Instructions and answers in the Alpaca template: Alpaca, its GPT-4 version, and WizardLM."""

from lora_one.datasets.settings import DatasetConfig
from lora_one.datasets.sources import Hub, read_rows
from lora_one.types import Example

PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
PROMPT_WITH_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
"""The published template for rows with an input; it has no opening sentence."""

REFUSALS = ("sorry", "as an ai")


def alpaca(config: DatasetConfig) -> list[Example]:
    return alpaca_rows(("yahma/alpaca-cleaned", None), config)


def alpaca_gpt4(config: DatasetConfig) -> list[Example]:
    return alpaca_rows(("vicgalle/alpaca-gpt4", None), config)


def alpaca_rows(hub: Hub, config: DatasetConfig) -> list[Example]:
    rows = read_rows(hub, config.path, "train", ["instruction", "input", "output"])
    return [Example((PROMPT_WITH_INPUT if row["input"] else PROMPT).format(**row), row["output"]) for row in rows]


def wizard_lm(config: DatasetConfig) -> list[Example]:
    """Return the rows whose answer is not a refusal."""
    hub = ("silk-road/Wizard-LM-Chinese-instruct-evol", None)
    rows = read_rows(hub, config.path, "train", ["instruction", "output"])
    return [
        Example(PROMPT.format(**row), row["output"])
        for row in rows
        if not any(word in row["output"].lower() for word in REFUSALS)
    ]
