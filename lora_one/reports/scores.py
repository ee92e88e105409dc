"""The score of a finished evaluation, read from its folder."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_one.errors import UsageError, nearest
from lora_one.files import read_lines
from lora_one.statistics.units import POINTS, unit_in

HELD_OUT = "loss"  # the task of the loss on the test split of a comparison, which is not an evaluation
COUNTS = {"answers": "total", "unparsed": "unparsed", "cut": "cut_off"}  # of a score -> of metrics.json


def score_in(folder: Path, metric: str | None = None, *, with_answers: bool = True) -> dict[str, Any]:
    """Return one metric of an evaluation: task, value, metric, unit (the fields of ``Unit``), facts about the answers.

    metric: None: see ``main_metric``.  predictions: path of the file with the answers; None: there is none, or the
    metric is not the share of answers for which one of their fields is true.  field: the name of that field.
    answers: their number; unparsed, cut: of those without a readable answer, and ended by the limit of new tokens.
    settings: the options that determine the results.
    with_answers: False: the file with the answers, which may be large, is not read; predictions and field are None.
    Raises UsageError: the evaluation has no such metric.
    """
    report = json.loads((folder / "metrics.json").read_text())
    metrics, counts = report["metrics"], report.get("counts", {}) | report.get("remarks", {})
    metric = metric or main_metric(metrics)
    if metric not in metrics:
        raise UsageError(f"{report['task']} reports no metric {metric}; {nearest(metric, metrics)}")
    unit, predictions = unit_in(report, metric), folder / "predictions.jsonl"
    field = field_of(predictions, metrics[metric], metric) if with_answers and unit == POINTS else None
    found = {"task": report.get("task"), "value": metrics[metric], "metric": metric, "unit": asdict(unit)}
    found |= {"predictions": str(predictions) if field else None, "field": field}
    found |= {"settings": settings_of(report)}
    return found | {name: counts.get(key) for name, key in COUNTS.items()}


def main_metric(metrics: Mapping[str, float]) -> str:
    """Return the metric that stands for an evaluation: accuracy over all examples, or else the first one.

    A benchmark with levels, subjects or several sets names those before the whole.

    >>> main_metric({"accuracy/Level 1": 1.0, "accuracy": 0.2}), main_metric({"pass@1": 0.1, "pass@10": 0.3})
    ('accuracy', 'pass@1')
    """
    return "accuracy" if "accuracy" in metrics else next(iter(metrics))


def settings_of(report: dict[str, Any]) -> dict[str, Any]:
    """Return the options that determine the results of an evaluation, also those of rescored answers."""
    return report.get("settings_of_completions", {}) | report.get("settings", {})


def difference_of_settings(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    """Return in words the first setting in which two scores differ, apart from the model; None: there is none."""
    earlier = {"engine": "transformers", "chat_template": False}  # of versions without these settings
    first, second = earlier | one["settings"], earlier | other["settings"]
    for name in {**first, **second}:
        if name not in ("adapter", "model_name") and first.get(name) != second.get(name):
            return f"--{name} is {first.get(name)} there and {second.get(name)} here"
    return None


def field_of(predictions: Path, value: float, metric: str) -> str | None:
    """Return the field of the answers of which a metric is the share; None: it is another measure, such as Matthews'.

    It is the field with the metric's name, as correct_official is that of accuracy_official, or else the plain one.
    """
    lines = read_lines(predictions)
    for field in ("correct" + metric.removeprefix("accuracy"), "correct"):
        hits = [line.get(field) for line in lines]
        if lines and all(isinstance(hit, bool) for hit in hits) and abs(sum(hits) / len(hits) - value) < 1e-9:
            return field
    return None
