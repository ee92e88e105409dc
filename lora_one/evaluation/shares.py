"""Metrics of every benchmark: shares of correct answers with standard errors, and counts."""

from collections.abc import Sequence
from typing import Any

from lora_one.statistics.shares import share_of


def shares(hits: dict[str, Sequence[bool]]) -> dict[str, float]:
    """Return the share of hits of each metric, followed by its standard error as ``<metric>_stderr``."""
    found: dict[str, float] = {}
    for metric, values in hits.items():
        found[metric], found[f"{metric}_stderr"] = share_of(values)
    return found


def by_kind(predictions: Sequence[dict[str, Any]], kinds: dict[str, str]) -> dict[str, list[bool]]:
    """Return metric -> the hits of all lines, for metrics whose field all lines have; kinds: metric -> field."""
    complete = {metric: field for metric, field in kinds.items() if all(field in line for line in predictions)}
    return {metric: [line[field] for line in predictions] for metric, field in complete.items()}


def counts_of(predictions: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Return the numbers of answers that are correct, wrong, or unparsed (no answer was found in the completion)."""
    total, correct = len(predictions), sum(line["correct"] for line in predictions)
    unparsed = sum(line["prediction"] is None for line in predictions)
    return {"correct": correct, "wrong": total - correct - unparsed, "unparsed": unparsed, "total": total}
