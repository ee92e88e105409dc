"""A mean over examples of different sizes, with its standard error."""

from collections.abc import Sequence
from math import sqrt


def weighted_mean(values: Sequence[float], weights: Sequence[float]) -> tuple[float, float | None]:
    """Return sum w_i x_i / sum w_i over independent examples, and its standard error as a ratio of two sums.

    With equal weights the standard error is sd / sqrt(n); it is None for a single example.

    >>> weighted_mean([1.0, 3.0], [1, 1])
    (2.0, 1.0)
    """
    total, n = sum(weights), len(values)
    center = sum(value * weight for value, weight in zip(values, weights, strict=True)) / total
    if n == 1:
        return center, None
    squares = sum((weight * (value - center)) ** 2 for value, weight in zip(values, weights, strict=True))
    return center, sqrt(squares * n / (n - 1)) / total
