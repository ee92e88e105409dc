"""Wilson's interval against its definition and its closed form."""

import doctest
from math import sqrt

import pytest
from scipy.stats import binomtest

from lora_one.statistics import shares as module
from lora_one.statistics.shares import percent, wilson

Z = 1.959963984540054


@pytest.mark.parametrize(("hits", "n"), [(0, 200), (200, 200), (1, 3), (37, 81), (1, 1), (600, 1319)])
def test_wilson_is_the_set_of_shares_that_the_score_test_accepts(hits, n):
    """The ends x solve (p - x)^2 = z^2 x (1 - x) / n."""
    p = hits / n
    low, high = wilson(p, n)
    for end in (low, high):
        assert (p - end) ** 2 == pytest.approx(Z**2 * end * (1 - end) / n, abs=1e-12)
    assert 0 <= low <= p <= high <= 1 and high - low > 0
    closed = (p + Z**2 / (2 * n) + Z * sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))) / (1 + Z**2 / n)
    assert high == pytest.approx(closed, abs=1e-12)
    assert binomtest(hits, n).proportion_ci(method="wilson") == pytest.approx((low, high), abs=1e-9)


def test_no_hit_at_all_is_not_certain():
    assert "0.00 to 1.88, n = 200" in percent(0.0, 200) and "98.12 to 100.00" in percent(1.0, 200)


def test_doctests():
    assert doctest.testmod(module).failed == 0
