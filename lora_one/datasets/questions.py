"""The questions of evaluations, which training rows must not contain; some evaluations are known by name."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_one.datasets import commonsense, gsm8k, mmlu
from lora_one.datasets.sources import Hub, read_rows
from lora_one.errors import UsageError

HUMANEVAL: Hub = ("openai/openai_humaneval", None)
MATH = "EleutherAI/hendrycks_math"  # one configuration per subject
COLUMNS = ("question", "problem", "prompt", "instruction")  # of local files; the first that exists is read
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
    """Source of the questions of an evaluation, without a template: ``column`` of the test splits of ``hubs``."""

    hubs: tuple[Hub, ...]
    column: str


EVALUATIONS = {
    "gsm8k": QuestionSource((gsm8k.SOURCE,), "question"),
    "humaneval": QuestionSource((HUMANEVAL,), "prompt"),
    "math": QuestionSource(tuple((MATH, subject) for subject in MATH_SUBJECTS), "problem"),
    "mmlu": QuestionSource((mmlu.SOURCE,), "question"),
}


def evaluations_in(decontaminate: Any) -> list[Any]:
    """Return the evaluations in a value of ``dataset.decontaminate``: names in EVALUATIONS, local files or folders.

    decontaminate: one evaluation, a list of evaluations, or None for none.
    """
    if decontaminate is None:
        return []
    return list(decontaminate) if isinstance(decontaminate, list) else [decontaminate]


def questions_of(evaluation: str) -> Iterator[str]:
    """Yield the questions of an evaluation's test split, without template and options.

    evaluation: a name in EVALUATIONS (read from the hub), or a local file or folder; MMLU's folder of csv files and the
    folder of the commonsense sets are recognised.
    Raises UsageError: a local file has no column of questions; RunError: it cannot be read.
    """
    if evaluation in EVALUATIONS:
        source = EVALUATIONS[evaluation]
        for hub in source.hubs:
            yield from (row[source.column] for row in read_rows(hub, None, "test", [source.column]))
        return
    place = Path(evaluation).expanduser()
    if any(place.glob("test/*_test.csv")):
        yield from (row[0] for rows in mmlu.read_questions(evaluation, "test").values() for row in rows)
        return
    for part in sorted(folder for folder in place.glob("*/") if any(folder.glob("test.*"))) or [place]:
        for row in read_rows(None, str(part), "test", [], optional=COLUMNS):
            text = next((row[column] for column in COLUMNS if column in row), None)
            if text is None:
                raise UsageError(
                    f"dataset.decontaminate: {part} has no column named {', '.join(COLUMNS)}: rename the column with "
                    "the questions to one of these"
                )
            yield commonsense.question_in(text)
