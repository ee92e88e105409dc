"""The weighted mean and its standard error, against the plain mean and a simulation of ratios."""

import doctest
from math import sqrt
from statistics import mean, stdev

import numpy
import pytest

from lora_one.statistics import means
from lora_one.statistics.means import weighted_mean


def test_equal_weights_give_the_plain_mean():
    values = [1.0, 4.0, 2.5, -3.0]
    assert weighted_mean(values, [3, 3, 3, 3]) == pytest.approx((mean(values), stdev(values) / sqrt(4)))
    assert weighted_mean([2.0], [7]) == (2.0, None)


def test_the_error_is_that_of_a_ratio_of_two_sums():
    """The spread of the ratio over 4,000 samples of 50 examples, whose values depend on their sizes."""
    random = numpy.random.default_rng(0)
    found, errors = [], []
    for _ in range(4_000):
        sizes = random.integers(1, 40, 50)
        values = 2 + sizes / 20 + random.normal(0, 1, 50)
        center, error = weighted_mean(values.tolist(), sizes.tolist())
        found.append(center)
        errors.append(error)
    assert mean(errors) == pytest.approx(stdev(found), rel=0.05)


def test_doctests():
    assert doctest.testmod(means).failed == 0
