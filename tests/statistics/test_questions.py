"""McNemar's test and the bootstrap over questions, by hand and against slow formulas."""

from math import comb

import numpy
import pytest

from lora_one.statistics.questions import bootstrap, mcnemar


def test_mcnemar_by_hand():
    """8 questions only the first answers, 2 only the second: p = 2 (C(10,0) + C(10,1) + C(10,2)) / 2^10."""
    first = numpy.array([1] * 8 + [0] * 2 + [1] * 30 + [0] * 10, dtype=bool)
    second = numpy.array([0] * 8 + [1] * 2 + [1] * 30 + [0] * 10, dtype=bool)
    found = mcnemar(first, second)
    assert (found.first_only, found.second_only) == (8, 2)
    assert found.p == pytest.approx(2 * sum(comb(10, k) for k in range(3)) / 2**10)
    assert mcnemar(second, first).p == pytest.approx(found.p)
    assert mcnemar(first, first).p == 1.0


def test_questions_are_resampled_whole():
    """Three equal seeds are no more information than one: the interval stays, while independent answers narrow it."""
    rng = numpy.random.default_rng(0)
    one, other = rng.random((1, 400)) < 0.6, rng.random((1, 400)) < 0.5
    single = bootstrap(one, other)
    assert bootstrap(one.repeat(3, axis=0), other.repeat(3, axis=0)) == single
    assert single.difference == pytest.approx(one.mean() - other.mean())
    independent = bootstrap(rng.random((3, 400)) < 0.6, rng.random((3, 400)) < 0.5)
    width = single.interval[1] - single.interval[0]
    assert independent.interval[1] - independent.interval[0] < 0.7 * width


def test_the_interval_is_that_of_a_slow_bootstrap():
    rng = numpy.random.default_rng(1)
    first, second = rng.random((2, 150)) < 0.7, rng.random((3, 150)) < 0.6
    differences = [first[:, j].mean() - second[:, j].mean() for j in range(150)]
    means = sorted(numpy.mean(rng.choice(differences, 150)) for _ in range(9_999))
    found = bootstrap(first, second)
    assert found.interval == pytest.approx((means[249], means[9749]), abs=0.004)
    assert found == bootstrap(first, second)


@pytest.mark.parametrize("difference", [0, 1])
def test_answers_that_hardly_differ_give_no_interval(difference):
    """With 3 of 200 the bootstrap would cover the truth too rarely, and with none its interval has no width."""
    second = numpy.zeros((1, 200), dtype=bool)
    first = second ^ bool(difference)
    assert bootstrap(first, second).interval is None
    first[0, :9] ^= True
    found = bootstrap(first, second)
    assert found.interval is None and found.unlike == 9 and found.questions == 200
    first[0, 9] ^= True
    low, high = bootstrap(first, second).interval
    assert low < abs(difference - 0.05) < high


def test_few_questions_give_no_interval_and_other_questions_are_refused():
    few = numpy.ones((1, 99), dtype=bool)
    assert bootstrap(few, ~few).interval is None and bootstrap(few, ~few).difference == 1.0
    with pytest.raises(ValueError, match="99 and 98 questions"):
        bootstrap(few, few[:, 1:])
    with pytest.raises(ValueError, match="same questions"):
        mcnemar(few[0], few[0, 1:])
