"""The score of a finished evaluation, read from its folder."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_one.errors import UsageError, nearest
from lora_one.statistics.units import POINTS, unit_in

COUNTS = {"answers": "total", "unparsed": "unparsed", "cut": "cut_off"}  # of a score -> of metrics.json


def score_in(folder: Path, metric: str | None = None) -> dict[str, Any]:
    """Return one metric of an evaluation: value, metric, unit (the fields of ``Unit``), and facts about the answers.

    metric: None: the first one.  predictions: path of the file with the answers; None: there is none, or the metric is
    not a share of correct answers.  answers: their number; unparsed, cut: of those without a readable answer, and ended
    by the limit of new tokens.
    Raises UsageError: the evaluation has no such metric.
    """
    report = json.loads((folder / "metrics.json").read_text())
    metrics, counts = report["metrics"], report.get("counts", {}) | report.get("remarks", {})
    metric = metric or next(iter(metrics))
    if metric not in metrics:
        raise UsageError(f"{report['task']} reports no metric {metric}; {nearest(metric, metrics)}")
    unit, predictions = unit_in(report, metric), folder / "predictions.jsonl"
    answered = unit == POINTS and predictions.exists()
    found = {"value": metrics[metric], "metric": metric, "unit": asdict(unit)}
    found |= {"predictions": str(predictions) if answered else None}
    return found | {name: counts.get(key) for name, key in COUNTS.items()}
