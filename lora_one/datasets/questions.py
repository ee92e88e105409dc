"""Evaluations known by name and the source of their questions, which training rows must not contain."""

from dataclasses import dataclass
from typing import Any

from lora_one.datasets import gsm8k, mmlu
from lora_one.datasets.sources import Hub

HUMANEVAL: Hub = ("openai/openai_humaneval", None)
MATH = "EleutherAI/hendrycks_math"  # one configuration a subject
MATH_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)


@dataclass(frozen=True)
class QuestionSource:
    """Where the questions of an evaluation are: the test splits of ``hubs``, in ``column``, without a template."""

    hubs: tuple[Hub, ...]
    column: str


EVALUATIONS = {
    "gsm8k": QuestionSource((gsm8k.SOURCE,), "question"),
    "humaneval": QuestionSource((HUMANEVAL,), "prompt"),
    "math": QuestionSource(tuple((MATH, subject) for subject in MATH_SUBJECTS), "problem"),
    "mmlu": QuestionSource((mmlu.SOURCE,), "question"),
}


def evaluations_in(decontaminate: Any) -> list[Any]:
    """Return the evaluations of a ``dataset.decontaminate``: names of EVALUATIONS, local files or folders.

    decontaminate: one of these, a list of these, or None for none.
    """
    if decontaminate is None:
        return []
    return list(decontaminate) if isinstance(decontaminate, list) else [decontaminate]
