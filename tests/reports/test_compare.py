"""A comparison is honest: chosen by validation, reported on another split, the same work for every method."""

import doctest
import math

import numpy
import pytest

from lora_one.reports import compare as table
from lora_one.reports.compare import Run, choose, grid_points, method_row
from tests.helpers.comparisons import RATE


def tried(rate, loss, **further):
    error = None if loss is not None else "the loss became nan"
    return Run("m", "tuning", {RATE: rate}, further.pop("seed", 1), None, error, validation_loss=loss, **further)


POINTS = [{RATE: rate} for rate in (1e-3, 3e-3, 1e-2)]


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ((3.0, 2.0, 2.5), 3e-3),
        ((2.0, 2.0, 2.5), 1e-3),
        ((3.0, None, 2.5), 1e-2),
        ((3.0, math.nan, 2.5), 1e-2),
        ((3.0, math.inf, None), 1e-3),
        ((None, None, math.nan), None),
    ],
    ids=["lowest", "first of equals", "failed", "no number", "infinite", "all failed"],
)
def test_choice_is_the_lowest_validation_loss(losses, best):
    tuning = [tried(point[RATE], loss) for point, loss in zip(POINTS, losses, strict=True)]
    assert choose(POINTS, tuning) == (None if best is None else {RATE: best})


def test_choice_never_looks_at_the_test_loss():
    tuning = [tried(1e-3, 2.0, test_loss=9.0), tried(3e-3, 2.1, test_loss=1.0), tried(1e-2, 2.2, test_loss=math.nan)]
    assert choose(POINTS, tuning) == {RATE: 1e-3}


def test_choice_over_several_tuning_seeds_is_of_the_mean_and_a_point_that_failed_once_is_out():
    losses = {1e-3: (1.0, 4.0), 3e-3: (2.0, 2.2), 1e-2: (0.1, None)}
    tuning = [tried(rate, loss, seed=seed) for rate, pair in losses.items() for seed, loss in enumerate(pair)]
    assert choose(POINTS, tuning) == {RATE: 3e-3}


def test_row_has_mean_and_sample_deviation_and_marks_the_end_of_a_grid():
    grid = {RATE: [1e-3, 1e-2], "model.prec_reg": [1e-6, 1e-4, 1e-2], "model.warmup": [0.1]}
    point = {RATE: 1e-2, "model.prec_reg": 1e-4, "model.warmup": 0.1}
    final, start, seconds = [3.1, 3.4, 3.2], [4.0, 4.5, 4.1], [0.5, 0.7, 0.9]
    runs = [Run("m", "final", point, seed, None, None, 3.0, loss, 9.0) for seed, loss in enumerate(final)]
    pairs = zip(start, seconds, strict=True)
    runs += [Run("m", "start", point, seed, None, None, 5.0, *pair) for seed, pair in enumerate(pairs)]
    runs.append(Run("m", "tuning", point, 7, None, None, 0.1, 0.1, 0.1))
    row = method_row("m", runs, point, grid_points(grid), 6.0)
    for name, values in (("final_loss", final), ("init_loss", start), ("init_seconds", seconds)):
        assert row[f"{name}_mean"] == pytest.approx(numpy.mean(values))
        assert row[f"{name}_sd"] == pytest.approx(numpy.std(values, ddof=1))
    assert (row["validation_loss_mean"], row["validation_loss_sd"]) == (3.0, 0.0)
    assert (row["seeds"], row["grid_points"], row["pretrained_loss"]) == (3, 6, 6.0)
    assert row["edge"] == f"{RATE}=highest model.warmup=only"


def test_a_start_that_harmed_is_noted_in_the_row():
    point = {RATE: 1e-3}
    runs = [Run("m", "final", point, seed, None, None, 3.0, 3.0) for seed in (1, 2)]
    runs.append(Run("m", "final", point, 3, None, None, 3.0, 3.0, warnings=("the start raised the loss",)))
    row = method_row("m", runs, point, [point], 6.0)
    assert row["note"] == "warning at the start, 1 of 3 seeds: the start raised the loss"


def test_warnings_of_another_kind_are_counted_apart():
    """Those of one kind differ in their numbers alone."""
    texts = ("raised the loss from 0.1 to 2e-1", "is almost no step: from 0.1 to 0.1", "raised the loss from 3 to 4.5")
    runs = [Run("m", "final", {RATE: 1e-3}, seed, None, None, 3.0, 3.0, warnings=(t,)) for seed, t in enumerate(texts)]
    raised, almost = method_row("m", runs, {RATE: 1e-3}, [{RATE: 1e-3}], 6.0)["note"].split("; ")
    assert raised == f"warning at the start, 2 of 3 seeds: {texts[0]}"
    assert almost == f"warning at the start, 1 of 3 seeds: {texts[1]}"


def test_texts_of_a_grid_have_no_end():
    points = grid_points({RATE: [1e-3], "optimizer": ["adamw", "scaled_adamw"], "a": [True, False]})
    assert table.edges(points[0], points) == {RATE: "only"}


def test_unequal_training_is_reported():
    point = {RATE: 1e-3}
    runs = [Run(name, "final", point, 1, None, steps=30, tokens=900) for name in "ab"]
    assert table.uneven(runs) == []
    (said,) = table.uneven([*runs, Run("c", "final", point, 1, None, steps=30, tokens=899)])
    assert "seed 1: 30 steps, 900 tokens: a, b; 30 steps, 899 tokens: c" in said


@pytest.mark.parametrize("steps", [-4, -3, 0.4, 5, 6])
def test_two_rounds_reach_a_minimum_far_beyond_the_grid(steps):
    """A parabola in log(rate), with its minimum up to four steps of the grid beyond its ends (0 and 2 steps)."""
    points, best = grid_points({RATE: [1e-3, 1e-2, 1e-1]}), None
    for left in (2, 1, 0):
        best = min(points, key=lambda point: abs(math.log10(point[RATE] / 1e-3) - steps))
        points = [*points, *table.further_points(points, best)] if left else points
    assert len(points) == 7, "the same number of runs for every method"
    assert abs(math.log10(best[RATE] / 1e-3) - steps) <= 0.5


def test_doctests():
    assert doctest.testmod(table).failed == 0
