"""A share of correct answers: its standard error, its interval, and how it is printed."""

from collections.abc import Sequence
from math import sqrt


def share_of(hits: Sequence[bool]) -> tuple[float, float]:
    """Return the share p of hits and its standard error sqrt(p (1 - p) / n)."""
    share = sum(hits) / len(hits)
    return share, sqrt(share * (1 - share) / len(hits))


def hits_in(share: float, n: int) -> int | None:
    """Return the number of hits with this share of n examples; None: no whole number has it.

    >>> hits_in(2 / 3, 300), hits_in(0.5, 3)
    (200, None)
    """
    hits = round(share * n)
    return hits if abs(hits - share * n) < 1e-6 else None


def wilson(share: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's interval for a share p of n independent examples: all x with |p - x| <= z sqrt(x (1 - x) / n).

    It is within [0, 1], and has a width also for p = 0 and p = 1 (JASA 22, 1927, p. 209).
    Raises ValueError: no whole number of hits has this share.
    """
    from scipy.stats import binomtest  # takes a second, and not every command needs it

    hits = hits_in(share, n)
    if hits is None:
        raise ValueError(f"{share} of {n} examples is no whole number of hits, so there is no Wilson interval")
    low, high = binomtest(hits, n).proportion_ci(confidence, method="wilson")
    return float(low), float(high)


def percent(share: float, n: int) -> str:
    """Return a share of n examples with its interval, as text; without it if no whole number of hits has this share.

    >>> percent(0.0, 200)
    '  0.00 % (95 % interval 0.00 to 1.88, n = 200)'
    >>> percent(0.5, 3)
    ' 50.00 % (n = 3)'
    """
    if hits_in(share, n) is None:
        return f"{100 * share:6.2f} % (n = {n})"
    low, high = (100 * end for end in wilson(share, n))
    return f"{100 * share:6.2f} % (95 % interval {low:.2f} to {high:.2f}, n = {n})"
