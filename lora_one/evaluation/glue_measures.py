"""Measures of GLUE other than accuracy: Matthews' coefficient and F1, with the jackknife's standard error."""

from collections import Counter
from collections.abc import Callable
from math import sqrt

Pairs = Counter[tuple[int, int]]  # (true class, predicted class or -1) -> examples


def matthews(pairs: Pairs) -> float:
    """Return Matthews' correlation coefficient, in its form for any number of classes; 0 if it is undefined."""
    n = pairs.total()
    right = sum(count for (true, predicted), count in pairs.items() if true == predicted)
    by_truth, by_prediction = Counter[int](), Counter[int]()
    for (true, predicted), count in pairs.items():
        by_truth[true] += count
        by_prediction[predicted] += count
    covariance = n * right - sum(by_truth[place] * by_prediction[place] for place in by_truth)
    squares = (sum(count**2 for count in counts.values()) for counts in (by_truth, by_prediction))
    first, second = (n**2 - square for square in squares)
    spread = sqrt(first * second)
    return covariance / spread if spread else 0.0


def f1(pairs: Pairs) -> float:
    """Return F1 of the class 1 (duplicates, equivalent sentences); 0 if this class neither occurs nor is predicted."""
    hits = pairs[1, 1]
    true = sum(count for (place, _), count in pairs.items() if place == 1)
    predicted = sum(count for (_, place), count in pairs.items() if place == 1)
    return 2 * hits / (true + predicted) if true + predicted else 0.0


def jackknife(measure: Callable[[Pairs], float], pairs: Pairs) -> float:
    """Return the standard error of a measure of n independent examples: sqrt((n - 1)/n sum_i (m_(-i) - mean)^2)."""
    n = pairs.total()
    without = {cell: measure(pairs - Counter([cell])) for cell in pairs}  # m_(-i), equal for all examples of a cell
    mean = sum(pairs[cell] * value for cell, value in without.items()) / n
    return sqrt((n - 1) / n * sum(pairs[cell] * (value - mean) ** 2 for cell, value in without.items()))


MEASURES: dict[str, dict[str, Callable[[Pairs], float]]] = {
    "cola": {"matthews": matthews},
    "mrpc": {"f1": f1},
    "qqp": {"f1": f1},
}
