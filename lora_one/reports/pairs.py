"""Tests of two finished things: two configurations with their seeds, or two files of predictions."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy

from lora_one.errors import UsageError
from lora_one.records.folder import RunFolder, reason_in
from lora_one.reports.fairness import NOT_SHARED
from lora_one.reports.fairness import compared as in_common
from lora_one.reports.findings import aligned, compared, question_sentence, tested
from lora_one.reports.measurements import identity
from lora_one.reports.predictions import common_field, fields_in, first_line, right_answers
from lora_one.reports.scores import HELD_OUT, difference_of_settings, score_in, settings_of
from lora_one.statistics.shares import percent
from lora_one.statistics.units import NATS, POINTS, Unit
from lora_one.statistics.verdicts import verdicts

VALIDATION = {"validation loss": ("eval_loss", NATS), "validation accuracy": ("eval_accuracy", POINTS)}


def compare_predictions(first: Path, second: Path, metric: str | None = None, filtered: str | None = None) -> str:
    """Return the shares of two evaluations of the same questions, and the tests of their difference.

    metric: the field of a line that says whether the answer is correct; None, and filtered: see ``correct_answers``.
    Raises UsageError: a file cannot be read, or they are not of the same questions.
    """
    if first == second:
        raise UsageError(f"{first} is given twice: pass two files")
    metric = metric or common_field((first, second), filtered)
    answers = aligned({path: path for path in (first, second)}, metric, filtered)
    lines_of = {path: first_line(path, filtered) for path in answers}
    own = {path: metric or fields_in(line)[0] for path, line in lines_of.items()}
    lines = [f"{path}: {share_text(row)}, field {own[path]}" for path, row in answers.items()]
    known = {right_answers(line) for line in lines_of.values()}
    if len(known) > 1 or None in known:
        lines.append("warning: whether the questions are the same is known from their ids alone")
    reports = [path.parent / "metrics.json" for path in (first, second)]
    if all(report.exists() for report in reports):
        settings = [{"settings": settings_of(json.loads(report.read_text()))} for report in reports]
        difference = difference_of_settings(*settings)
        lines += [f"warning: not with the same settings: {difference}"] if difference is not None else []
    entry = {"method": str(first), **compared({None: answers[first]}, {None: answers[second]})}
    return "\n".join([*lines, question_sentence(entry, str(second)) + "."])


def share_text(row: numpy.ndarray) -> str:
    """Return the share of correct answers; Wilson's interval is for questions with one sample, an array of bool."""
    if row.dtype == bool:
        return percent(float(row.mean()), len(row)).strip()
    return f"{100 * row.mean():.2f} % (n = {len(row)})"


def compare_runs(first: Path, second: Path) -> str:
    """Return the tests of two configurations: paired by seed on validation, and on each evaluation that both have.

    A run that is not finished, or lacks an evaluation, counts as failed: without it, its side is not called better.
    first, second: the folder of a run, or of a configuration with the runs of its seeds. The second is the baseline.
    Raises UsageError: no finished run is in a folder.
    """
    if first == second:
        raise UsageError(f"{first} is given twice: pass two folders")
    runs, failed = {}, {}
    for path in (first, second):
        runs[str(path)], failed[str(path)] = runs_of(path)
    baseline = str(second)
    lines = differences(runs)
    for name, found in failed.items():
        lines += [f"warning: {name}, seed {seed}: not compared, {reason}" for seed, reason in found.items()]
    for figure, (key, unit) in VALIDATION.items():
        values = {name: validation_of(found, key) for name, found in runs.items()}
        if all(values.values()):
            lines += section(figure, values, baseline, unit, failed)
    for task in sorted(set.intersection(*(evaluations_in(found) for found in runs.values()))):
        lines += evaluation_section(task, runs, baseline, failed)
    return "\n".join(lines)


def differences(runs: Mapping[str, Mapping[int, RunFolder]]) -> list[str]:
    """Return a warning for each thing that two configurations should have in common but do not, such as the data."""
    identities = [identity(folder.read()) for found in runs.values() for folder in found.values()]
    names = dict.fromkeys(name for one in identities for name in one if name not in NOT_SHARED)
    checked = {name: in_common([one.get(name) for one in identities]) for name in names}
    return [
        f"warning: not the same in all runs: {name}: {text}" for name, (text, same) in checked.items() if same == "no"
    ]


def section(
    figure: str,
    values: Mapping[str, Mapping[int, float]],
    baseline: str,
    unit: Unit,
    failed: Mapping[str, Collection[int]],
) -> list[str]:
    """Return the lines of a figure: each value by seed, and the verdict. failed: seeds without a value, by name."""
    lines = [figure]
    for name, by_seed in values.items():
        lines.append(f"  {name}: " + ", ".join(f"{value:.4g} (seed {seed})" for seed, value in by_seed.items()))
    return [*lines, *(f"  {verdict.sentence}" for verdict in verdicts(values, baseline, unit, failed))]


def evaluation_section(
    task: str, runs: Mapping[str, Mapping[int, RunFolder]], baseline: str, failed: Mapping[str, Collection[int]]
) -> list[str]:
    """Return the lines of an evaluation that both configurations have. failed: seeds without a finished run."""
    places = {
        (name, seed): folder.path / "eval" / task for name, found in runs.items() for seed, folder in found.items()
    }
    scores = {key: score_in(place) for key, place in places.items() if (place / "metrics.json").exists()}
    values: dict[str, dict[int, float]] = {}
    for (name, seed), score in scores.items():
        values.setdefault(name, {})[seed] = score["value"]
    files = {key: Path(score["predictions"]) for key, score in scores.items() if score["predictions"]}
    fields = {scores[key]["field"] for key in files}
    first = next(iter(scores.values()))
    title = "loss on test data of a comparison" if first["task"] == HELD_OUT else task
    missing = {name: [seed for seed in found if (name, seed) not in scores] for name, found in runs.items()}
    lost = {name: [*failed[name], *seeds] for name, seeds in missing.items()}
    lines = section(title, values, baseline, Unit(**first["unit"]), lost)
    for name, seeds in missing.items():
        lines += [f"  warning: {name}, seed {seed}: not evaluated" for seed in seeds]
    differing = ((key, difference_of_settings(first, score)) for key, score in scores.items())
    for (name, seed), difference in differing:
        if difference is not None:
            lines.append(f"  warning: {name}, seed {seed}: not with the same settings: {difference}")
    try:
        tests = tested(files, baseline, fields.pop() if len(fields) == 1 else None)
    except UsageError as error:  # the other results must not be lost
        return [*lines, f"  these trained models: not compared: {error}"]
    return [*lines, *(f"  these trained models: {question_sentence(entry, baseline)}." for entry in tests)]


def runs_of(path: Path) -> tuple[dict[int, RunFolder], dict[int, str]]:
    """Return seed -> finished run of a folder, and seed -> why there is no result, for the runs that are not finished.

    Raises UsageError: no run is finished.
    """
    folders = [path] if (path / "run.json").exists() else [file.parent for file in path.glob("*/run.json")]
    done: dict[int, RunFolder] = {}
    failed: dict[int, str] = {}
    for folder in map(RunFolder, sorted(folders)):
        record = folder.read()
        if record.get("status") == "finished":
            done[record["config"]["seed"]] = folder
        elif "config" in record:
            failed[record["config"]["seed"]] = reason_in(record)
    if not done:
        raise UsageError(
            f"{path} contains no finished run: pass the folder of a run, or of a configuration with the folders of its "
            "seeds, as run_exp.py prints them"
        )
    return dict(sorted(done.items())), failed


def validation_of(runs: Mapping[int, RunFolder], key: str) -> dict[int, float]:
    """Return seed -> a figure of the validation after training, for the runs that have it."""
    found = {seed: folder.read()["evaluation"].get("final", {}).get(key) for seed, folder in runs.items()}
    return {seed: value for seed, value in found.items() if value is not None}


def evaluations_in(runs: Mapping[int, RunFolder]) -> set[str]:
    """Return the evaluations that a run has: the paths of their folders below eval/."""
    return {
        str(file.parent.relative_to(folder.path / "eval"))
        for folder in runs.values()
        for file in (folder.path / "eval").rglob("metrics.json")
    }
