"""What a comparison shows against its baseline: verdicts from the seeds, and tests over the questions."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy

from lora_one.errors import UsageError
from lora_one.reports.compare import Run
from lora_one.reports.predictions import check_same_answers, common_questions, correct_answers
from lora_one.statistics.questions import MIN_QUESTIONS, bootstrap, mcnemar
from lora_one.statistics.units import NATS, POINTS, Unit
from lora_one.statistics.verdicts import verdicts

LOSS, VALIDATION = "test loss", "validation loss"
LOSSES = {LOSS: "test_loss", VALIDATION: "validation_loss"}  # figure -> field of a run
Key = TypeVar("Key")


def findings(
    runs: Sequence[Run],
    baseline: str,
    evaluations: Sequence[str],
    loss: str = LOSS,
    answered: Collection[str] | None = None,
    family: int = 0,
) -> list[dict[str, Any]]:
    """Return the findings of each figure: the evaluations, then the loss.

    Each has ``figure``, ``verdicts`` (one for each method but the baseline; none if the baseline has no value) and, for
    an evaluation, ``questions``.
    answered: the methods whose answers are compared; None: all.  family: see ``verdicts``.
    """
    found = []
    asked = runs if answered is None else [run for run in runs if run.method in answered]
    for figure in (*evaluations, loss):
        values = by_seed(runs, figure)
        if values and baseline not in values:
            found.append({"figure": figure, "verdicts": [], "questions": []})
        if baseline in values:
            judged = verdicts(values, baseline, unit_of(runs, figure), failures(runs, figure), family)
            part = {"figure": figure, "verdicts": [asdict(verdict) for verdict in judged]}
            part["questions"] = []
            try:
                part["questions"] = questions(asked, baseline, figure) if figure in evaluations else []
            except UsageError as error:  # the runs are finished, and their results must not be lost
                part["untested"] = str(error)
            found.append(part)
    return found


def unit_of(runs: Sequence[Run], figure: str) -> Unit:
    """Return the unit of a figure: nats of a loss; of an evaluation, the unit that is part of its scores."""
    if figure in LOSSES:
        return NATS
    units = (run.scores[figure]["unit"] for run in runs if "unit" in run.scores.get(figure, {}))
    unit = next(units, None)
    return POINTS if unit is None else Unit(**unit)


def by_seed(runs: Sequence[Run], figure: str, stage: str = "final") -> dict[str, dict[int, float]]:
    """Return method -> seed -> value of the runs in a stage, by default the trained chosen points."""
    found: dict[str, dict[int, float]] = {}
    for run in runs:
        value = value_of(run, figure)
        if run.stage == stage and run.error is None and value is not None:
            found.setdefault(run.method, {})[run.seed] = value
    return found


def value_of(run: Run, figure: str) -> float | None:
    """Return a figure of a run: one of its losses, or the value of an evaluation."""
    return getattr(run, LOSSES[figure]) if figure in LOSSES else run.scores.get(figure, {}).get("value")


def failures(runs: Sequence[Run], figure: str) -> dict[str, set[int]]:
    """Return method -> seeds of the final runs that have no value: the run, or its evaluation, failed or is missing."""
    found: dict[str, set[int]] = {}
    for run in runs:
        if run.stage == "final" and (run.error is not None or value_of(run, figure) is None):
            found.setdefault(run.method, set()).add(run.seed)
    return found


def questions(runs: Sequence[Run], baseline: str, evaluation: str) -> list[dict[str, Any]]:
    """Return the tests of each method's trained models against the baseline's, over the questions of an evaluation.

    Raises UsageError: the predictions of two runs are not of the same questions.
    """
    files: dict[tuple[str, int], Path] = {}
    for run in runs:
        if run.stage == "final" and run.scores.get(evaluation, {}).get("predictions"):
            files[run.method, run.seed] = Path(run.scores[evaluation]["predictions"])
    fields = {run.scores[evaluation].get("field") for run in runs if run.scores.get(evaluation, {}).get("predictions")}
    return tested(files, baseline, next(iter(fields), None))


def tested(files: Mapping[tuple[str, int], Path], baseline: str, metric: str | None = None) -> list[dict[str, Any]]:
    """Return the tests of each method against the baseline; [] if there are no predictions of one of them.

    files: (method, seed) -> predictions.  metric, errors: see ``aligned``.
    """
    answers: dict[str, dict[int, numpy.ndarray]] = {}
    for (method, seed), row in aligned(files, metric).items():
        answers.setdefault(method, {})[seed] = row
    return [
        {"method": method, **compared(own, answers[baseline])}
        for method, own in answers.items()
        if method != baseline and baseline in answers
    ]


def aligned(
    files: Mapping[Key, Path], metric: str | None = None, filtered: str | None = None
) -> dict[Key, numpy.ndarray]:
    """Return which answers of each file are correct, as arrays (questions,) of bool in one order of the questions.

    If a question has several samples, the arrays are of float: the share of its correct ones.
    metric, filtered: see ``correct_answers``. Raises UsageError: see there; or they have different questions.
    """
    if not files:
        return {}
    answers = {key: correct_answers(path, metric, filtered) for key, path in files.items()}
    order = common_questions({str(files[key]): found for key, found in answers.items()})
    check_same_answers(list(files.values()))
    single = all(len(samples) == 1 for found in answers.values() for samples in found.values())
    kind = bool if single else float
    return {key: numpy.array([numpy.mean(found[name]) for name in order], kind) for key, found in answers.items()}


def compared(first: Mapping[int | None, numpy.ndarray], second: Mapping[int | None, numpy.ndarray]) -> dict[str, Any]:
    """Compare the answers of two methods: the cluster bootstrap over all seeds, and McNemar's test seed by seed.

    first, second: seed -> array (questions,) of bool; of float: shares of correct samples, without McNemar's test.
    The seed None is that of answers without a seed.
    """
    found = bootstrap(numpy.array(list(first.values())), numpy.array(list(second.values())))
    both = [seed for seed in first if seed in second and first[seed].dtype == second[seed].dtype == bool]
    return {**asdict(found), "mcnemar": {seed: asdict(mcnemar(first[seed], second[seed])) for seed in both}}


def question_sentence(entry: Mapping[str, Any], baseline: str) -> str:
    """Return the tests over questions of one method as a sentence."""
    text = f"{entry['method']} minus {baseline}: {POINTS.text(entry['difference'])}"
    if entry["interval"] is None and entry["questions"] >= MIN_QUESTIONS:
        text += f" (no interval: the same difference at all but {entry['unlike']} of {entry['questions']} questions)"
    elif entry["interval"] is None:
        text += f" ({entry['questions']} questions are too few for an interval)"
    else:
        low, high = (POINTS.text(end).split()[0] for end in entry["interval"])
        text += f" (95 % interval over {entry['questions']} questions {low} to {high})"
    tests = [
        f"seed {seed}: " * (seed is not None) + f"{test['first_only']} and {test['second_only']}, p = {test['p']:.2g}"
        for seed, test in entry["mcnemar"].items()
    ]
    title = "; McNemar, questions that only the first and only the second answers correctly: "
    return text + (title + "; ".join(tests)) * bool(tests) + reach_over_questions(entry)


def reach_over_questions(entry: Mapping[str, Any]) -> str:
    """Return which difference the questions find, and how many half of it needs; "" without an interval.

    The records of earlier versions do not have it.
    """
    smallest, n = entry.get("detectable"), entry["questions"]
    if smallest is None:
        return ""
    return (
        f". If the differences vary as on these questions, {n} questions find a true difference of "
        f"{POINTS.text(smallest, '')} in 8 of 10 comparisons; half of that needs {4 * n}"
    )
