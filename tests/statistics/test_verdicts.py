"""Verdicts: Holm by hand, and the sentence for each outcome."""

import doctest
from dataclasses import replace

import pytest

from lora_one.statistics import verdicts as module
from lora_one.statistics.seeds import detectable, interval, seeds_for
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


def test_impossible_differences_are_not_printed():
    """Shares lie in [0, 1]: no difference to 0.6 is above 60 points."""
    figures = {"LoRA": BASE, "noise": plus(0.3, -0.3, 0.25, -0.2, 0.1)}
    most = POINTS.largest_difference(sum(BASE.values()) / len(BASE))
    (found,) = verdicts(figures, "LoRA", POINTS, family=8)
    test, level = found.test, 0.05 / 8
    assert max(map(abs, interval(test, 1 - level))) > most and detectable(test.sd, test.n, level) > most
    needed = seeds_for(most, test.sd, level)
    assert "the noise is so large that no possible difference is excluded" in found.sentence
    assert f"the largest possible difference, {POINTS.text(most, '')}, needs {needed} seeds." in found.sentence
    (unbounded,) = verdicts(figures, "LoRA", replace(POINTS, bounds=None), family=8)
    assert "differences above" in unbounded.sentence and "find a true difference" in unbounded.sentence


def test_a_small_difference_is_not_printed_as_zero():
    losses = {"LoRA": {1: 1.0, 2: 1.1, 3: 1.2}, "other": {1: 1.00002, 2: 1.100021, 3: 1.200022}}
    (found,) = verdicts(losses, "LoRA", NATS)
    assert found.outcome == "worse" and "+2e-05 nats" in found.sentence and "0.0000" not in found.sentence


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
