"""Data sets: one file per source of rows, one line per data set in DATASETS. This package does not import torch."""

from lora_one.datasets import (
    arithmetic_problems,
    chat,
    codefeedback,
    commonsense,
    emo,
    flan,
    glue,
    gsm8k,
    instruct,
    meta_math,
    own,
    squad,
    super_glue,
)
from lora_one.datasets.description import DataSet
from lora_one.datasets.settings import StreamedConfig

DATASETS: dict[str, DataSet] = {
    "alpaca": DataSet(instruct.alpaca, settings=StreamedConfig, evaluation="mmlu"),
    "alpaca_gpt4": DataSet(instruct.alpaca_gpt4, settings=StreamedConfig, evaluation="mmlu"),
    "arithmetic": DataSet(arithmetic_problems.problems, settings=arithmetic_problems.ArithmeticConfig, generated=True),
    "chat": DataSet(chat.conversations, settings=chat.ConversationConfig, conversations=True),
    "codefeedback": DataSet(codefeedback.code_answers, settings=StreamedConfig, evaluation="humaneval"),
    "commonsense_reasoning": DataSet(
        commonsense.train, settings=commonsense.CommonsenseConfig, evaluation="commonsense", nested=True
    ),
    "flan": DataSet(flan.flan, settings=StreamedConfig),
    "flan_v2": DataSet(flan.flan_v2, settings=StreamedConfig),
    "gsm8k": DataSet(gsm8k.train, evaluation="gsm8k"),
    "json": DataSet(own.own_rows, settings=own.OwnDataConfig),
    "meta_math": DataSet(meta_math.gsm8k_part, settings=StreamedConfig, evaluation="gsm8k"),
    "meta_math_full": DataSet(meta_math.whole, settings=StreamedConfig, evaluation="gsm8k"),
    "squad": DataSet(squad.train, squad.validation),
    "wizard_lm": DataSet(instruct.wizard_lm, settings=StreamedConfig),
    "emo": DataSet.of_classes(emo.EMO),
    **{
        name: DataSet.of_classes(task, f"glue --dataset={name}")
        for name, task in (glue.TASKS | super_glue.TASKS).items()
    },
}
CLASSIFIED = tuple(sorted(name for name, dataset in DATASETS.items() if dataset.labels))


def labels_of(name: str) -> tuple[str, ...] | None:
    """Return the words of a classification set, ordered by class index; None for other sets."""
    return DATASETS[name].labels
