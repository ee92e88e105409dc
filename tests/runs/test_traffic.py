"""The formulas of what is sent, against sums over layers; benchmarks/bench_plan.py counts the real operations."""

import doctest

import pytest

from lora_one.runs import traffic
from lora_one.runs.traffic import Traffic

SHAPES = [(6, 4), (4, 10), (5, 5)]


def test_doctests():
    assert doctest.testmod(traffic).failed == 0


def ring(kind, chunks, processes):
    """Bytes that one process sends: a ring passes chunks of S / N, N - 1 times for each phase."""
    phases = {"all_reduced": 2, "reduced": 1, "broadcast": 1, "gathered": 1}[kind]
    return sum(chunks / processes for _ in range(phases) for _ in range(processes - 1))


@pytest.mark.parametrize("processes", [1, 2, 8, 64])
@pytest.mark.parametrize("kind", vars(Traffic()))
def test_a_process_sends_what_a_ring_passes_on(kind, processes):
    assert Traffic(**{kind: 640}).sent(processes) == pytest.approx(ring(kind, 640, processes))


def test_a_step_averages_the_gradients_once_and_gathers_a_sharded_base_twice_for_each_micro_batch():
    assert traffic.training_step(100, 0, 8) == Traffic(all_reduced=400)
    assert traffic.training_step(100, 1000, 8) == Traffic(all_reduced=400, gathered=16_000)


def test_factors_are_sent_once_for_each_layer():
    floats = sum(m * 3 + 3 + 3 * n + 1 + 3 for m, n in SHAPES)  # U, S, Vh, energy, slopes
    assert traffic.shared_steps(SHAPES, 3) == Traffic(broadcast=4 * floats)
    assert traffic.chosen_ranks(SHAPES, 3) == Traffic(broadcast=4 * sum(3 * n + m * 3 for m, n in SHAPES))


@pytest.mark.parametrize("passes", [1, 2, 3, 11])
def test_a_sketch_sends_one_product_of_each_layer_in_each_pass(passes):
    columns = [5 + 2] + [5] * (passes - 1)  # the probes only in the first pass
    rows = [(m, n)[number % 2] for m, n in SHAPES for number in range(passes)]
    expected = 8 * sum(row * columns[index % passes] for index, row in enumerate(rows))
    assert traffic.summed_sketches(SHAPES, 5, 2, 8, passes) == Traffic(all_reduced=expected)


def test_moments_are_sent_to_the_owner_of_a_layer():
    found = traffic.summed_moments(SHAPES, [4, 10], 3, 4)
    gradients = sum(4 * m * n for m, n in SHAPES)
    assert found.reduced == 8 * (16 + 100) + gradients + 8 * (6 + 4 + 5)
    assert found.broadcast == 4 * sum(3 * (m + n) + 2 for m, n in SHAPES)
