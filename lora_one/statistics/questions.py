"""The layer of test questions: two evaluations of the same questions, by trained models that are taken as they are.

Correct answers are arrays (seeds, questions) of bool. What is found holds for these models, not for their methods: of
another seed's model it says nothing.
"""

from dataclasses import dataclass
from math import sqrt

import numpy
from scipy import stats

from lora_one.statistics.seeds import POWER

RESAMPLES = 9_999
MIN_QUESTIONS = 100  # intervals over 30 and 50 held the truth in only 92 to 93 % (three seeds, 90 % correct)
MIN_UNLIKE = 10  # with fewer, the interval of a bootstrap is too narrow; with none, it has no width


@dataclass(frozen=True)
class QuestionTest:
    """Difference of two shares of correct answers, (first - second), over the same questions.

    interval: 95 %, by a paired bootstrap over questions; None: fewer than MIN_QUESTIONS questions, or unlike is
    below MIN_UNLIKE.  unlike: questions whose difference is not the most frequent one (mostly 0).
    detectable: the true difference that as many questions find in 8 of 10 comparisons; None: without interval.
    """

    difference: float
    interval: tuple[float, float] | None
    questions: int
    unlike: int
    detectable: float | None


@dataclass(frozen=True)
class McNemar:
    """Exact test of McNemar (Psychometrika 12, 1947): the questions that only one of two models answers correctly.

    p: two-sided, of a binomial test of first_only among first_only + second_only at 1/2; 1 if both are 0.
    """

    first_only: int
    second_only: int
    p: float


def bootstrap(first: numpy.ndarray, second: numpy.ndarray, seed: int = 0) -> QuestionTest:
    """Compare two arrays (seeds, questions), also of different numbers of seeds.

    Resampled are whole questions with the answers of every seed (a cluster bootstrap), because the answers of several
    models to one question are not independent. Raises ValueError: other questions, or none.
    """
    first, second = numpy.atleast_2d(first), numpy.atleast_2d(second)
    if first.shape[1] != second.shape[1] or not first.shape[1]:
        raise ValueError(f"{first.shape[1]} and {second.shape[1]} questions: compare evaluations of the same questions")
    differences = first.mean(axis=0) - second.mean(axis=0)
    n = len(differences)
    unlike = n - int(numpy.unique(differences.round(9), return_counts=True)[1].max())
    if n < MIN_QUESTIONS or unlike < MIN_UNLIKE:
        return QuestionTest(float(differences.mean()), None, n, unlike, None)
    found = stats.bootstrap(
        (differences,),
        numpy.mean,
        n_resamples=RESAMPLES,
        batch=max(1, 10_000_000 // n),  # numbers in memory at once
        method="percentile",
        rng=numpy.random.default_rng(seed),
    )
    low, high = found.confidence_interval
    smallest = detectable(float(differences.std(ddof=1)), n)
    return QuestionTest(float(differences.mean()), (float(low), float(high)), n, unlike, smallest)


def detectable(sd: float, n: int) -> float:
    """Return the smallest true difference that n questions find with probability POWER, two-sided at 5 %.

    (z_0.975 + z_POWER) sd / sqrt(n), arXiv:2411.00640 on power; so half of it needs four times the questions.
    sd: standard deviation of the differences between two evaluations, one a question; their mean is taken as normal.
    """
    return float(stats.norm.ppf(0.975) + stats.norm.ppf(POWER)) * sd / sqrt(n)


def mcnemar(first: numpy.ndarray, second: numpy.ndarray) -> McNemar:
    """Compare two models, each an array (questions,). Raises ValueError: other questions."""
    if first.shape != second.shape:
        raise ValueError(f"{first.size} and {second.size} questions: compare evaluations of the same questions")
    one, other = int((first & ~second).sum()), int((second & ~first).sum())
    p = stats.binomtest(one, one + other, 0.5).pvalue if one + other else 1.0
    return McNemar(one, other, float(p))
