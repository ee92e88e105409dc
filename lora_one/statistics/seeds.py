"""The layer of training seeds: paired differences of two methods, and what a number of seeds can show.

A difference is (method - baseline) at one seed, so it is paired: a seed fixes the order of the data and the examples of
the start for every method. The seeds are the sample; the questions of the test set are fixed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan, sqrt

import numpy
from scipy import optimize, stats

MIN_SEEDS = 3  # with two, equal differences are frequent; the intervals of the others cover too often (test_seeds.py)
POWER = 0.8
MOST_SEEDS = 10_000


@dataclass(frozen=True)
class SeedTest:
    """Paired t test of differences, one a seed, in the unit of the figure.

    sd: sample standard deviation (n - 1); None: one seed.  interval: 95 % t interval of the mean; p: two-sided; both
    None: fewer than MIN_SEEDS seeds, or all differences are equal, so that their noise is unknown.
    """

    differences: tuple[float, ...]
    mean: float
    sd: float | None
    interval: tuple[float, float] | None
    p: float | None

    @property
    def n(self) -> int:
        return len(self.differences)

    @property
    def testable(self) -> bool:
        return self.p is not None


def paired(differences: Sequence[float], rounding: float = 0.0) -> SeedTest:
    """Test the mean of paired differences against zero (Student's t). Raises ValueError: no difference.

    rounding: of the values that were subtracted; differences that vary by no more count as equal.
    """
    if len(differences) == 0:
        raise ValueError("no differences: a test needs at least one seed that both methods have")
    values = numpy.asarray(differences, dtype=float)
    mean = float(values.mean())
    sd = float(values.std(ddof=1)) if len(values) > 1 else None
    if len(values) < MIN_SEEDS or equal(values, rounding):
        return SeedTest(tuple(values.tolist()), mean, sd, None, None)
    found = stats.ttest_1samp(values, 0.0)
    low, high = found.confidence_interval(0.95)
    return SeedTest(tuple(values.tolist()), mean, sd, (float(low), float(high)), float(found.pvalue))


def equal(values: numpy.ndarray, rounding: float) -> bool:
    """Return whether the values vary by no more than this rounding, or that of a subtraction in fp64."""
    return bool(numpy.ptp(values) <= max(rounding, 1e-12 * max(1.0, numpy.abs(values).max())))


def interval(test: SeedTest, confidence: float) -> tuple[float, float]:
    """Return the t interval of the mean at another confidence. test: a testable one."""
    return tuple(map(float, stats.t.interval(confidence, test.n - 1, test.mean, test.sd / sqrt(test.n))))


def power(difference: float, sd: float, n: int, alpha: float) -> float:
    """Return the probability that the t test finds this true difference: noncentral t, two-sided at level alpha."""
    critical = stats.t.ppf(1 - alpha / 2, n - 1)
    shift = difference * sqrt(n) / sd
    wrong_side = stats.nct.cdf(-critical, n - 1, shift)  # at most Phi(-shift); scipy gives nan where it is below 1e-14
    return float(stats.nct.sf(critical, n - 1, shift) + (0.0 if isnan(wrong_side) else wrong_side))


def detectable(sd: float, n: int, alpha: float) -> float:
    """Return the smallest true difference that n seeds find with probability POWER, at level alpha."""
    high = 1.0  # in units of sd, like everything here
    while power(high, 1.0, n, alpha) < POWER:
        high *= 2
    return sd * float(optimize.brentq(lambda difference: power(difference, 1.0, n, alpha) - POWER, 0, high))


def seeds_for(difference: float, sd: float, alpha: float) -> int | None:
    """Return the smallest number of seeds that finds this true difference with probability POWER, at level alpha.

    None: more than MOST_SEEDS.
    """
    low, high = MIN_SEEDS - 1, MIN_SEEDS
    while power(difference, sd, high, alpha) < POWER:
        low, high = high, 2 * high
        if low > MOST_SEEDS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(difference, sd, middle, alpha) >= POWER else (middle, high)
    return high
