"""A share of correct answers: its standard error, its interval, and how it is printed."""

from collections.abc import Sequence
from math import sqrt
from statistics import NormalDist


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
