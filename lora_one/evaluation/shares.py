"""Metrics of every benchmark: shares of correct answers with standard errors, and counts."""

from collections.abc import Sequence
from math import sqrt
from statistics import NormalDist
from typing import Any


def share_of(hits: Sequence[bool]) -> tuple[float, float]:
    """Return the share p of hits and its standard error sqrt(p (1 - p) / n)."""
    share = sum(hits) / len(hits)
    return share, sqrt(share * (1 - share) / len(hits))


def wilson(share: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's interval for a share p of n independent examples: all x with |p - x| <= z sqrt(x (1 - x) / n).

    It is within [0, 1], and has a width also for p = 0 and p = 1 (JASA 22, 1927, p. 209).
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    middle = share + z * z / (2 * n)
    width = z * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = ((middle + sign * width) / (1 + z * z / n) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)  # rounding may leave [0, 1]


def percent(share: float, n: int) -> str:
    """Return a share with its interval, as text.

    >>> percent(0.0, 200)
    '  0.00 % (95 % interval 0.00 to 1.88, n = 200)'
    """
    low, high = (100 * end for end in wilson(share, n))
    return f"{100 * share:6.2f} % (95 % interval {low:.2f} to {high:.2f}, n = {n})"


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
