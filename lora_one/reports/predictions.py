"""The correct answers of an evaluation, read from its file of predictions: ours, or the samples of lm_eval."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_one.errors import UsageError, nearest

RIGHT = (("gold", "id"), ("target", "doc_id"))  # fields of the right answer and its question: ours, lm_eval's
CORRECT = ("correct", "exact_match", "acc", "acc_norm")  # fields of ours, and of lm_eval's samples; the first one found


def correct_answers(path: Path, metric: str | None = None, filtered: str | None = None) -> dict[str, list[bool]]:
    """Return question -> whether the answer of each of its samples is correct.

    metric: the field to read; None: the first of CORRECT.  filtered: of lm_eval's samples, the lines of this filter.
    Raises UsageError: the file cannot be read, a line has no id or no such field, a field says neither yes nor no, or
    the answers are scored by several filters and none is chosen.
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
    numbered = of_filter(path, lines, filtered)
    chosen = metric or next(iter(fields_in(numbered[0][1])), None)
    found: dict[str, list[bool]] = {}
    for number, line in numbered:
        question = next((str(line[name]) for name in ("id", "doc_id") if name in line), None)
        if question is None or chosen not in line:
            fields = ", ".join(line)
            raise UsageError(
                f"{path}, line {number}: no id or no field {chosen or ' or '.join(CORRECT)}; it has {fields}"
            )
        if line[chosen] not in (0, 1, None):  # None: undecided, as of mathematics that took too long
            raise UsageError(
                f"{path}, line {number}: {chosen} is {line[chosen]!r}, which does not say whether the answer is "
                "correct: choose another field with --metric"
            )
        found.setdefault(question, []).append(bool(line[chosen]))
    return found


def fields_in(line: Mapping[str, Any]) -> list[str]:
    """Return the fields of an answer that say whether it is correct."""
    return [name for name in CORRECT if name in line]


def common_field(paths: Sequence[Path], filtered: str | None = None) -> str | None:
    """Return the first field that all files have; None: there is none, so that each has its own.

    filtered: see ``correct_answers``.
    Raises UsageError: one is acc and another acc_norm, of lm_eval, which are different scores of one answer.
    """
    known = [fields_in(first_line(path, filtered)) for path in paths]
    shared = [name for name in CORRECT if all(name in fields for fields in known)]
    if shared:
        return shared[0]
    read = {path: fields[0] for path, fields in zip(paths, known, strict=True) if fields}
    if {"acc", "acc_norm"} <= set(read.values()):
        texts = " and ".join(f"{field} in {path}" for path, field in read.items())
        raise UsageError(f"the files have no field in common that says whether an answer is correct: {texts}")
    return None


def first_line(path: Path, filtered: str | None = None) -> dict[str, Any]:
    """Return the first answer of a file, of a filter if one is given; {} if there is none that can be read.

    What is wrong with the file, ``correct_answers`` reports.
    """
    try:
        with path.open() as file:
            for line in map(json.loads, filter(str.strip, file)):
                if not isinstance(line, dict):
                    return {}
                if filtered is None or line.get("filter") == filtered:
                    return line
    except (OSError, ValueError):
        pass
    return {}


def right_answers(line: Mapping[str, Any]) -> str | None:
    """Return the field with the right answer: gold of ours, target of lm_eval's samples; None: there is none."""
    return next((answer for answer, question in RIGHT if line.get(question) is not None and answer in line), None)


def check_same_answers(paths: Sequence[Path]) -> None:
    """Raise UsageError if two files name another right answer for one question: they are of other data.

    The right answers are the field gold of ours, and target of lm_eval's samples; without it, nothing is known.
    """
    known: dict[tuple[str, str], tuple[str, Path]] = {}
    for path in paths:
        for line in map(json.loads, filter(str.strip, path.read_text().splitlines())):
            for field, question in ((answer, line.get(name)) for answer, name in RIGHT):
                if field not in line or question is None:
                    continue
                answer = json.dumps(line[field], sort_keys=True)
                before, first = known.setdefault((field, str(question)), (answer, path))
                if answer != before:
                    raise UsageError(
                        f"{first} and {path} are not of the same questions: the right answer to {question} is "
                        f"{before:.60} in the first one and {answer:.60} in the second one: evaluate both with the "
                        "same data"
                    )


def of_filter(path: Path, lines: list[dict[str, Any]], filtered: str | None) -> list[tuple[int, dict[str, Any]]]:
    """Return the lines of a filter with their numbers; lm_eval writes each document once for every filter.

    Raises UsageError: there are several filters and none is chosen, or the chosen one is not there.
    """
    known = list(dict.fromkeys(line["filter"] for line in lines if "filter" in line))
    if filtered is None and len(known) > 1:
        raise UsageError(f"{path} has answers of the filters {', '.join(known)}: choose one with --filter")
    if filtered is not None and filtered not in known:
        raise UsageError(f"--filter={filtered} is not in {path}; {nearest(filtered, known)}")
    numbered = enumerate(lines, start=1)
    return [(number, line) for number, line in numbered if filtered is None or line.get("filter") == filtered]


def common_questions(answers: Mapping[str, Mapping[str, Any]]) -> list[str]:
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
