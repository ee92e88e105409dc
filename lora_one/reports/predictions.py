"""The correct answers of an evaluation, read from its file of predictions: ours, or the samples of lm_eval."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from lora_one.errors import UsageError

CORRECT = ("correct", "exact_match", "acc", "acc_norm")  # fields of ours, and of lm_eval's samples; the first one found


def correct_answers(path: Path, metric: str | None = None) -> dict[str, bool]:
    """Return question -> whether the answer is correct. metric: the field to read; None: the first of CORRECT.

    A question with several samples has an entry for each: ``<id> (2)`` is the second one.
    Raises UsageError: the file cannot be read, or a line has no id or no such field.
    """
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path} cannot be read as JSON lines ({error}): pass the predictions.jsonl of an evaluation, or lm_eval's "
            "samples_<task>.jsonl"
        ) from error
    if not lines or not all(isinstance(line, dict) for line in lines):
        raise UsageError(f"{path} has no predictions: pass the predictions.jsonl of an evaluation")
    chosen = metric or next((name for name in CORRECT if name in lines[0]), None)
    found: dict[str, bool] = {}
    times: Counter[str] = Counter()
    for number, line in enumerate(lines, start=1):
        question = question_of(line)
        if question is None or chosen not in line:
            fields = ", ".join(line)
            raise UsageError(
                f"{path}, line {number}: no id or no field {chosen or ' or '.join(CORRECT)}; it has {fields}"
            )
        times[question] += 1
        name = question if times[question] == 1 else f"{question} ({times[question]})"
        found[name] = bool(line[chosen])
    return found


def question_of(line: dict[str, Any]) -> str | None:
    """Return the id of a line; lm_eval scores a document once for each filter."""
    if "id" in line:
        return str(line["id"])
    if "doc_id" in line:
        return str(line["doc_id"]) + (f", {line['filter']}" if "filter" in line else "")
    return None


def common_questions(answers: dict[str, dict[str, bool]]) -> list[str]:
    """Return the questions of several files, by name, in the order of the first one.

    Raises UsageError: they are not of the same questions.
    """
    (first, questions), *others = answers.items()
    for name, other in others:
        missing = [question for question in questions if question not in other]
        further = [question for question in other if question not in questions]
        if missing or further:
            example = (missing or further)[0]
            raise UsageError(
                f"{first} and {name} are not of the same questions: {len(missing)} are only in the first one and "
                f"{len(further)} only in the second one, for example {example}: evaluate both with the same data and "
                "--limit"
            )
    return list(questions)
