"""Simulated evaluations: correct answers of trained models whose true difference is known."""

from itertools import product

import numpy
import pytest
from scipy import optimize, special, stats

SEEDS, QUESTIONS, SHARES = (3, 5, 10), (100, 500, 1319), (0.05, 0.3, 0.9)
NOISE = 0.1  # sd of the logits over seeds: of all methods together, and of each one
LONG = [pytest.mark.slow, pytest.mark.long]


def cells(values):
    """These values with every number of questions and every share; a third is not long, and has each pair once."""
    sizes = (range(len(part)) for part in (values, QUESTIONS, SHARES))
    return [
        pytest.param(values[i], QUESTIONS[j], SHARES[k], marks=[] if (i + j + k) % 3 == 0 else LONG)
        for i, j, k in product(*sizes)
    ]


def difficulties(questions, share, spread=2.0):
    """Logits of a correct answer, normal with this spread, whose mean share is the given one."""
    normal = stats.norm.ppf((numpy.arange(questions) + 0.5) / questions) * spread
    return normal + optimize.brentq(lambda mean: numpy.mean(special.expit(mean + normal)) - share, -12, 12)


def answers(rng, n, logits, methods, effect=0.0):
    """Shares of correct answers (methods, n) on fixed questions, with the noise of seeds and of answers.

    A part of a seed's noise is common to all methods. The effect is on the last method, in logits.
    """
    shifts = rng.normal(0, NOISE, (n, 1)) + rng.normal(0, NOISE, (methods, n, 1))
    shifts[-1] += effect
    chances = special.expit((logits + shifts).astype(numpy.float32))
    return (rng.random(chances.shape, dtype=numpy.float32) < chances).mean(axis=2)


def difference(rng, logits, effect):
    """Mean and standard deviation of ``answers``' difference, last method minus first, over 2,000 seeds."""
    shared, *own = rng.normal(0, NOISE, (3, 2000, 1))
    first, last = (special.expit(logits + shared + noise) for noise in (own[0], own[1] + effect))
    of_answers = (first * (1 - first) + last * (1 - last)).mean() / len(logits)
    return (last - first).mean(), ((last - first).mean(axis=1).var() + of_answers) ** 0.5
