"""Verdicts: Holm by hand, the sentence for each outcome, and simulated comparisons with known truth."""

import doctest

import numpy
import pytest
from scipy import optimize, special, stats

from lora_one.statistics import verdicts as module
from lora_one.statistics.questions import bootstrap
from lora_one.statistics.seeds import detectable, paired, power, seeds_for
from lora_one.statistics.units import NATS, POINTS
from lora_one.statistics.verdicts import holm, reach, verdicts

BASE = {1: 0.50, 2: 0.52, 3: 0.51, 4: 0.49, 5: 0.50}


def plus(*changes):
    return {seed: BASE[seed] + change for seed, change in zip(BASE, changes, strict=False)}


def test_doctests():
    assert doctest.testmod(module).failed == 0


def test_holm_is_family_wise():
    assert holm({"a": 0.04, "b": 0.001, "c": 0.5}) == pytest.approx({"b": 0.003, "a": 0.08, "c": 0.5})
    assert holm({}) == {}


def test_methods_that_are_left_out_are_corrected_for():
    """As in the whole comparison, in the worst case: their p values are the largest ones."""
    assert holm({"a": 0.01, "b": 0.02}, further=3) == pytest.approx({"a": 0.05, "b": 0.08})
    assert holm({"a": 0.01, "b": 0.02, "c": 1.0, "d": 1.0, "e": 1.0})["b"] == pytest.approx(0.08)
    figures = {"LoRA": BASE, "other": plus(0.10, 0.11, 0.09, 0.10, 0.07)}
    (alone,) = verdicts(figures, "LoRA", POINTS)
    (among,) = verdicts(figures, "LoRA", POINTS, family=10)
    assert among.p == pytest.approx(10 * alone.p)
    assert "after Holm" in among.sentence and "after Holm" not in alone.sentence


def test_methods_that_cannot_be_tested_are_corrected_for():
    """Which methods stay at the larger class depends on the results, so they remain part of the family."""
    better = plus(0.10, 0.11, 0.09, 0.10, 0.07)
    (alone,) = verdicts({"LoRA": BASE, "other": better}, "LoRA", POINTS)
    stuck = {"same": dict(BASE), "one seed": plus(0.1), "no seed in common": {9: 0.5}, "no value": {}}
    found = {verdict.method: verdict for verdict in verdicts({"LoRA": BASE, "other": better} | stuck, "LoRA", POINTS)}
    assert found["other"].p == pytest.approx(5 * alone.p)
    assert all(found[method].outcome == "not tested" for method in stuck)


def test_differences_of_rounding_are_not_tested():
    """Losses that differ in the last digits of fp32 would else be worse, with p = 0.001."""
    noise = plus(2.4e-7, 2.3e-7, 2.6e-7)
    (verdict,) = verdicts({"LoRA": BASE, "the same": noise}, "LoRA", NATS)
    assert verdict.outcome == "not tested" and "its noise is unknown" in verdict.sentence
    diverged = {seed: 1e5 * seed for seed in BASE}
    found = verdicts({"LoRA": BASE, "lower": plus(-1e-3, -1.1e-3, -0.9e-3), "diverged": diverged}, "LoRA", NATS)
    assert found[0].test.testable, "the rounding is that of its own values"


def test_a_name_with_a_colon_stays_whole():
    figures = {"LoRA": BASE, "init: gaussian": plus(0.1, 0.11, 0.09, 0.1)}
    (verdict,) = verdicts(figures, "LoRA", POINTS, {"init: gaussian": {5}})
    assert verdict.sentence.count("init: gaussian") == 2 and "Of those: +10.0 points" in verdict.sentence


@pytest.mark.parametrize(
    ("change", "failing", "outcome"),
    [
        (0.1, "other", "not tested"),  # the seeds that are left may be its good ones
        (0.1, "LoRA", "better"),
        (-0.1, "other", "worse"),
        (-0.1, "LoRA", "not tested"),
    ],
)
def test_a_side_that_lost_seeds_is_not_called_better(change, failing, outcome):
    noise = (0.001, -0.001, 0.002, 0.0, 0.001)
    figures = {"LoRA": dict(BASE), "other": plus(*(change + part for part in noise))}
    for seed in (4, 5):
        del figures[failing][seed]
    (verdict,) = verdicts(figures, "LoRA", POINTS, {failing: {4, 5}})
    assert verdict.outcome == outcome and f"2 seeds of {failing}" in verdict.sentence
    (verdict,) = verdicts(figures, "LoRA", POINTS, {failing: {9}})  # a seed that the other side does not have either
    assert verdict.outcome in ("better", "worse") and "Failed" not in verdict.sentence


def test_outcomes():
    found = verdicts(
        {
            "LoRA": BASE,
            "much better": plus(0.10, 0.11, 0.09, 0.10, 0.12),
            "worse": plus(-0.10, -0.11, -0.09, -0.10, -0.12),
            "noise": plus(0.01, -0.01, 0.02, -0.02, 0.005),
            "two seeds": plus(0.10, 0.11),
            "equal": plus(0.0, 0.0, 0.0),
            "others": {7: 0.5},
        },
        "LoRA",
        POINTS,
    )
    outcome = {verdict.method: verdict.outcome for verdict in found}
    assert outcome == {
        "much better": "better",
        "worse": "worse",
        "noise": "no difference shown",
        "two seeds": "not tested",
        "equal": "not tested",
        "others": "not tested",
    }
    sentence = {verdict.method: verdict.sentence for verdict in found}
    assert sentence["much better"].startswith(
        "much better is better than LoRA: +10.4 points (95 % interval of this method alone +9.0 to +11.8"
    )
    assert "excluded for all 6 methods together" in sentence["noise"]
    assert "differences above" in sentence["noise"] and "half of that needs" in sentence["noise"]
    assert "2 seeds are too few" in sentence["two seeds"] and "no seed in common" in sentence["others"]
    assert "its noise is unknown" in sentence["equal"]


def test_a_lower_loss_is_better():
    losses = {"LoRA": BASE, "lower": plus(-0.10, -0.11, -0.09, -0.10, -0.12)}
    (found,) = verdicts(losses, "LoRA", NATS)
    assert found.outcome == "better" and "-0.1040 nats" in found.sentence


@pytest.mark.parametrize("sd", [0.003, 2.5])
@pytest.mark.parametrize(("n", "level"), [(3, 0.05), (10, 0.05 / 29)])
def test_what_a_design_finds_is_proportional_to_the_noise(sd, n, level):
    """So that it is computed once for all methods with as many seeds."""
    in_sds, needed = reach(n, level)
    smallest = detectable(sd, n, level)
    assert sd * in_sds == pytest.approx(smallest) and needed == seeds_for(smallest / 2, sd, level)


def difficulties(questions, share, spread=2.0):
    """Logits of a correct answer, normal with this spread, whose mean share is the given one."""
    normal = stats.norm.ppf((numpy.arange(questions) + 0.5) / questions) * spread
    return normal + optimize.brentq(lambda mean: numpy.mean(special.expit(mean + normal)) - share, -12, 12)


def answers(rng, n, questions, share, methods, effect=0.0):
    """Shares of correct answers (methods, n) on fixed questions, with the noise of seeds and of answers.

    A part of a seed's noise is common to all methods. The effect is on the last method, in logits.
    """
    logits = difficulties(questions, share) + rng.normal(0, 0.1, (n, 1)) + rng.normal(0, 0.1, (methods, n, 1))
    logits[-1] += effect
    return (rng.random((methods, n, questions)) < special.expit(logits)).mean(axis=2)


SEEDS, QUESTIONS, SHARES = (3, 5, 10), (100, 500, 1319), (0.05, 0.3, 0.9)


def grid(values):
    """These values with every number of questions and every share; every run of the tests has each pair once."""
    return [
        pytest.param(
            value, questions, share, marks=[] if (i + j + k) % 3 == 0 else [pytest.mark.slow, pytest.mark.long]
        )
        for i, value in enumerate(values)
        for j, questions in enumerate(QUESTIONS)
        for k, share in enumerate(SHARES)
    ]


def by_seed(values):
    return dict(enumerate(values.tolist()))


@pytest.mark.parametrize(("n", "questions", "share"), grid(SEEDS))
def test_simulated_methods_that_are_equal(n, questions, share):
    """1,000 comparisons of 3 methods with a baseline: wrong verdicts in at most 5 %, intervals that hold the truth.

    Wrong verdicts: 0.05 + 3 sqrt(.05 .95 / 1000).
    """
    rng = numpy.random.default_rng(n * questions)
    wrong, covered, intervals = 0, 0, 0
    for _ in range(1000):
        shares = answers(rng, n, questions, share, 4)
        figures = {f"method {k}": by_seed(values) for k, values in enumerate(shares)}
        found = verdicts_without_sentences(figures)
        wrong += any(p <= 0.05 for p in holm({k: test.p for k, test in found.items() if test.testable}).values())
        intervals += sum(test.testable for test in found.values())
        covered += sum(test.interval[0] <= 0 <= test.interval[1] for test in found.values() if test.testable)
    assert wrong / 1000 <= 0.0707
    assert 0.93 <= covered / intervals <= 0.97


def verdicts_without_sentences(figures):
    """The tests that ``verdicts`` makes; its sentences would take most of the time."""
    return {
        method: paired([values[seed] - figures["method 0"][seed] for seed in values])
        for method, values in figures.items()
        if method != "method 0"
    }


@pytest.mark.parametrize("n", [3, 5, 10])
def test_a_known_effect_is_found_with_the_promised_power(n):
    """Effect and sd are those of 4,000 seeds; 0.05 is three standard errors of 1,000 comparisons."""
    rng = numpy.random.default_rng(n)
    many = answers(rng, 4000, 500, 0.3, 2, effect=0.35)
    differences = many[1] - many[0]
    promised = power(differences.mean(), differences.std(), n, 0.05)
    samples = [answers(rng, n, 500, 0.3, 2, effect=0.35) for _ in range(1000)]
    found = numpy.mean([paired(shares[1] - shares[0]).p <= 0.05 for shares in samples])
    assert found == pytest.approx(promised, abs=0.05)


@pytest.mark.parametrize(("seeds", "questions", "share"), grid([1, 3]))
@pytest.mark.slow
def test_simulated_questions(seeds, questions, share, monkeypatch):
    """1,000 pairs of models, equal on average over questions: the interval over questions holds 0 in 93 to 97 %.

    Pairs without an interval, because they hardly differ, are left out; they are less than two thirds.
    """
    monkeypatch.setattr("lora_one.statistics.questions.RESAMPLES", 999)
    rng = numpy.random.default_rng(questions)
    covered, intervals = 0, 0
    for seed in range(1000):
        difficulty = rng.choice(difficulties(5000, share), questions)
        own = rng.normal(0, 1.0, (2, 1, questions))  # what one model finds harder than the other one
        first, second = rng.random((2, seeds, questions)) < special.expit(difficulty + own)
        interval = bootstrap(first, second, seed=seed).interval
        if interval is not None:
            intervals += 1
            covered += interval[0] - 1e-12 <= 0 <= interval[1] + 1e-12
    assert intervals > 333
    allowed = 3 * (0.05 * 0.95 / intervals) ** 0.5
    assert 0.93 - allowed <= covered / intervals <= 0.97 + allowed, covered
