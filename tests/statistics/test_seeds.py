"""The paired t test against textbook numbers and slow formulas; when there is none."""

import math

import numpy
import pytest
from scipy import integrate, stats

from lora_one.statistics import seeds
from lora_one.statistics.seeds import MIN_SEEDS, POWER, detectable, interval, paired, power, seeds_for
from tests.helpers.simulations import answers, difficulties

SLEEP = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]  # Student's data (Biometrika 6, 1908), first drug


def test_student_s_own_example():
    """Mean 0.75, sd 1.789; 2.262 is the tabled quantile of t with 9 degrees of freedom."""
    test = paired(SLEEP)
    assert test.mean == pytest.approx(0.75) and test.sd == pytest.approx(1.78901, abs=1e-5)
    half = 2.262157 * 1.78901 / math.sqrt(10)
    assert test.interval == pytest.approx((0.75 - half, 0.75 + half), abs=1e-4)
    assert test.p == pytest.approx(0.2176, abs=1e-4)
    assert interval(test, 0.95) == pytest.approx(test.interval)


def test_the_sign_follows_the_differences():
    test, opposite = paired([1.0, 2.0, 4.0]), paired([-1.0, -2.0, -4.0])
    assert opposite.mean == -test.mean and opposite.p == pytest.approx(test.p)
    assert opposite.interval == pytest.approx((-test.interval[1], -test.interval[0]))


@pytest.mark.parametrize("differences", [[0.5], [0.5, 0.7], [0.1, 0.1, 0.1], [0.3, 0.1 + 0.2, 0.3]])
def test_too_few_seeds_or_equal_differences_give_no_interval(differences):
    test = paired(differences)
    assert test.interval is None and test.p is None and not test.testable and test.n == len(differences)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.9])
def test_two_seeds_would_have_intervals_that_are_too_wide(share, monkeypatch):
    """100 questions, equal methods: 95 % intervals hold 0 in more than 97 %, because equal differences have none.

    In 2,000 comparisons, 4 to 10 % had equal differences, and 98.8 to 99.9 % of the intervals of the others held 0.
    """
    monkeypatch.setattr(seeds, "MIN_SEEDS", 2)
    first, second = answers(numpy.random.default_rng(0), 1000, difficulties(100, share), 2)
    tests = [paired(pair) for pair in (first - second).reshape(500, 2)]
    held = [low <= 0 <= high for low, high in (test.interval for test in tests if test.testable)]
    assert 0.02 < 1 - len(held) / 500 < 0.13 and numpy.mean(held) > 0.97


def test_no_difference_is_refused():
    with pytest.raises(ValueError, match="at least one seed"):
        paired([])


@pytest.mark.parametrize(("n", "alpha"), [(3, 0.05), (5, 0.0125), (10, 0.05)])
def test_power_is_the_probability_of_rejection(n, alpha):
    """P(|t| > critical), integrated over the distribution of the sample's sd instead of the noncentral t."""
    difference, sd = 1.3, 0.9
    critical = stats.t.ppf(1 - alpha / 2, n - 1)

    def given_sd(u):  # u = (n - 1) s^2 / sd^2 is chi-squared
        bound = critical * math.sqrt(u / (n - 1))
        shift = difference * math.sqrt(n) / sd
        return (stats.norm.sf(bound - shift) + stats.norm.cdf(-bound - shift)) * stats.chi2.pdf(u, n - 1)

    assert power(difference, sd, n, alpha) == pytest.approx(integrate.quad(given_sd, 0, 200)[0], abs=1e-6)


@pytest.mark.parametrize("alpha", [0.05, 0.00625])
@pytest.mark.parametrize("n", [3, 5, 10])
def test_power_rises_with_the_difference_up_to_1(n, alpha):
    """scipy's noncentral t is nan in the far tail, which once ended a whole comparison."""
    found = [power(difference, 1.0, n, alpha) for difference in numpy.linspace(0, 60, 601)]
    assert numpy.all(numpy.diff(found) >= 0) and found[0] == pytest.approx(alpha) and found[-1] > 0.97
    for sd in (1e-9, 0.03, 1e6):
        assert power(detectable(sd, n, alpha), sd, n, alpha) == pytest.approx(POWER)


@pytest.mark.parametrize("n", [3, 5, 10])
def test_the_detectable_difference_is_found_with_the_promised_power(n):
    """20,000 experiments; three standard errors are 0.0085."""
    smallest = detectable(2.0, n, 0.05)
    samples = numpy.random.default_rng(n).normal(smallest, 2.0, (20_000, n))
    found = stats.ttest_1samp(samples, 0.0, axis=1).pvalue <= 0.05
    assert found.mean() == pytest.approx(POWER, abs=0.0085)


def test_the_number_of_seeds_is_the_smallest_that_suffices():
    needed = seeds_for(1.0, 1.5, 0.05)
    assert power(1.0, 1.5, needed, 0.05) >= POWER > power(1.0, 1.5, needed - 1, 0.05)
    assert seeds_for(100.0, 1.0, 0.05) == MIN_SEEDS and seeds_for(1e-4, 1.0, 0.05) is None
