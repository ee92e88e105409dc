"""Simulated pairs of models on the same questions: what the intervals over questions hold, and what they find."""

import numpy
import pytest
from scipy import optimize, special

from lora_one.statistics.questions import bootstrap, detectable
from tests.helpers.simulations import cells, difficulties


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "questions", "share"), cells([1, 3]))
def test_intervals_over_questions_hold_the_truth(seeds, questions, share, monkeypatch):
    """1,000 intervals of models that are equal on average over questions: 93 to 97 % hold 0.

    Pairs without an interval, because they hardly differ, are left out; they are less than two thirds. With 4,000 pairs
    and all resamples, the shares of 16 of the 18 cells are 94.3 to 96.1 % (2026-11-29; the others were not read).
    """
    monkeypatch.setattr("lora_one.statistics.questions.RESAMPLES", 999)
    rng, logits = numpy.random.default_rng([seeds, questions, round(100 * share)]), difficulties(5000, share)
    pairs, covered, intervals = 0, 0, 0
    while intervals < 1000:
        pairs += 1
        own = rng.normal(0, 1.0, (2, 1, questions))  # what one model finds harder than the other one
        first, second = rng.random((2, seeds, questions)) < special.expit(rng.choice(logits, questions) + own)
        interval = bootstrap(first, second, seed=pairs).interval
        if interval is not None:
            intervals += 1
            covered += interval[0] - 1e-12 <= 0 <= interval[1] + 1e-12
    assert pairs < 3000
    assert 0.93 <= covered / intervals <= 0.97


@pytest.mark.parametrize("part", [1, 0.5])
@pytest.mark.parametrize(("questions", "unlike"), [(100, 0.2), (500, 0.1), (1319, 0.3)])
def test_the_detectable_difference_is_found_with_the_promised_power(questions, unlike, part):
    """Half of it with four times the questions. 20,000 pairs of models; three standard errors are 0.0085.

    The error of taking the mean as normal is at most 0.02, with 20 questions that only one model answers correctly.

    unlike: share of the questions that only one of two models answers correctly; a pair's sd is sqrt(unlike - d^2).
    A difference is found if |mean| > 1.96 sd / sqrt(n), both of the sample.
    """
    smallest = optimize.brentq(lambda d: detectable((unlike - d * d) ** 0.5, questions) - d, 0, unlike)
    true, n = smallest * part, round(questions / part**2)
    chances = [(unlike + true) / 2, (unlike - true) / 2, 1 - unlike]
    first_only, second_only, _ = numpy.random.default_rng(questions).multinomial(n, chances, 20_000).T
    mean = (first_only - second_only) / n
    error = numpy.sqrt(((first_only + second_only) / n - mean**2) / (n - 1))
    assert numpy.mean(numpy.abs(mean) > 1.959964 * error) == pytest.approx(0.8, abs=0.0285)
