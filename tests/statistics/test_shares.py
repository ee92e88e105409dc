"""Wilson's interval against its definition, its closed form and a published table."""

import doctest
from math import sqrt

import numpy
import pytest

from lora_one.statistics import shares as module
from lora_one.statistics.shares import hits_in, percent, wilson

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


def test_wilson_by_hand():
    """8 of 10, z^2 = 3.8415: middle (0.8 + 0.19207) / 1.38415, half width 1.95996 sqrt(0.016 + 0.0096036) / 1.38415."""
    assert wilson(0.8, 10) == pytest.approx((0.71674 - 0.22658, 0.71674 + 0.22658), abs=2e-5)


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_as_published(hits, n, low, high):
    """Newcombe, Statistics in Medicine 17 (1998), Table I, the score method without continuity correction."""
    assert wilson(hits / n, n) == pytest.approx((low, high), abs=5e-5)


def test_no_hit_at_all_is_not_certain():
    assert "0.00 to 1.88, n = 200" in percent(0.0, 200) and "98.12 to 100.00" in percent(1.0, 200)


def test_a_share_is_of_a_whole_number_of_hits():
    """Every share of hits is recognised after a division in fp64; a mean of shares has no Wilson interval."""
    assert all(hits_in(hits / n, n) == hits for n in (1, 3, 1319, 40_000) for hits in range(0, n + 1, max(1, n // 99)))
    rows = numpy.arange(1319) % 7 == 0
    assert "95 % interval" in percent(rows.mean(), len(rows))
    with pytest.raises(ValueError, match="no whole number of hits"):
        wilson(0.45, 10)
    assert percent(0.45, 10) == " 45.00 % (n = 10)"


def test_doctests():
    assert doctest.testmod(module).failed == 0
