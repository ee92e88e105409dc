"""Measures of GLUE other than accuracy: Matthews' coefficient and F1, with the jackknife's standard error."""

from collections import Counter
from collections.abc import Callable
from math import sqrt

Pairs = Counter[tuple[int, int]]  # (true class, predicted class or -1) -> examples


def matthews(pairs: Pairs) -> float:
    """Matthews' correlation coefficient, in its form for any number of classes; 0 where it has no value."""
    n = pairs.total()
    right = sum(count for (true, predicted), count in pairs.items() if true == predicted)
    truth, said = Counter[int](), Counter[int]()
    for (true, predicted), count in pairs.items():
        truth[true] += count
        said[predicted] += count
    covariance = n * right - sum(truth[place] * said[place] for place in truth)
    spread = sqrt((n**2 - sum(c**2 for c in truth.values())) * (n**2 - sum(c**2 for c in said.values())))
    return covariance / spread if spread else 0.0


def f1(pairs: Pairs) -> float:
    """F1 of the class 1, the duplicates; 0 where there is none and none is predicted."""
    hits = pairs[1, 1]
    true = sum(count for (place, _), count in pairs.items() if place == 1)
    said = sum(count for (_, place), count in pairs.items() if place == 1)
    return 2 * hits / (true + said) if true + said else 0.0


def jackknife(measure: Callable[[Pairs], float], pairs: Pairs) -> float:
    """Standard error of a measure of n independent examples: sqrt((n - 1)/n sum_i (m_(-i) - mean)^2)."""
    n = pairs.total()
    without = {cell: measure(pairs - Counter([cell])) for cell in pairs}  # the same for every example of a cell
    mean = sum(pairs[cell] * value for cell, value in without.items()) / n
    return sqrt((n - 1) / n * sum(pairs[cell] * (value - mean) ** 2 for cell, value in without.items()))


MEASURES: dict[str, dict[str, Callable[[Pairs], float]]] = {
    "cola": {"matthews": matthews},
    "mrpc": {"f1": f1},
    "qqp": {"f1": f1},
}
