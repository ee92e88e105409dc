"""GLUE: its metrics against scikit-learn, its answers against slow loops, on the real validation splits."""

import random
from collections import Counter

import pytest

from lora_one.evaluation import glue_measures


def test_matthews_and_f1_equal_scikit_learn_with_unparsed_answers_as_a_class():
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not here: pip install -e .[dev]")
    numbers = random.Random(0)
    for classes, said in ((2, (0, 1)), (2, (-1, 0, 1)), (3, (-1, 0, 1, 2)), (2, (1,))):
        truth = [numbers.randrange(classes) for _ in range(60)]
        predicted = [label if numbers.random() < 0.5 and label in said else numbers.choice(said) for label in truth]
        pairs = Counter(zip(truth, predicted, strict=True))
        assert glue_measures.matthews(pairs) == pytest.approx(metrics.matthews_corrcoef(truth, predicted), abs=1e-12)
        f1 = metrics.f1_score([place == 1 for place in truth], [place == 1 for place in predicted])
        assert glue_measures.f1(pairs) == pytest.approx(f1, abs=1e-12)


def test_the_jackknife_leaves_each_example_out_once():
    numbers = random.Random(1)
    lines = [(numbers.randrange(2), numbers.choice((-1, 0, 1, 1))) for _ in range(40)]
    for measure in (glue_measures.matthews, glue_measures.f1):
        without = [measure(Counter(lines[:place] + lines[place + 1 :])) for place in range(40)]
        mean = sum(without) / 40
        expected = (39 / 40 * sum((value - mean) ** 2 for value in without)) ** 0.5
        assert glue_measures.jackknife(measure, Counter(lines)) == pytest.approx(expected, rel=1e-9)
