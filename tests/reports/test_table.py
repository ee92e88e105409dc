"""The table of a sweep: a column for each key that differs, a row for each job without a result, aligned decimals."""

import doctest
from pathlib import Path

from lora_one.reports import table as module
from lora_one.reports.table import SweepJob, sweep_table


def job(rate, seed, loss, accuracy):
    record = {"evaluation": {"final": {"eval_loss": loss, "eval_accuracy": accuracy}}}
    return SweepJob({"model.learning_rate": rate}, Path(f"results/p/lr{rate}/{seed}"), record)


def test_decimal_points_are_below_each_other():
    jobs = [job("1e-3", 1, 12.25, 0.05), job("1e-4", 1, 3.5, 1.0), job("1e-4", 2, 3.25, 0.5)]
    failed = SweepJob({"model.learning_rate": "1|2"}, note="seed 1: failed: nan | inf")
    lines = sweep_table([*jobs, failed]).splitlines()
    header, _, *rows = lines[:5]
    start = header.index("accuracy (%)")
    assert len({row.index(".", start) for row in rows[:2]}) == 1
    start = header.index("val. loss")
    assert len({row.index(".", start) for row in rows[:2]}) == 1
    assert "3.3750 +- 0.1768" in rows[1] and "75.00 +- 35.36" in rows[1]
    assert lines[-1] == "- model.learning_rate=1|2, seed 1: failed: nan | inf", "a reason may be long"
    assert r"| 1\|2 " in rows[2]
    assert "standard deviation over the seeds" in lines[-2]


def test_a_cell_says_how_many_seeds_it_has_if_some_lack_the_value():
    """A run that was finished before an accuracy was asked for has none, and others may have one of more examples."""
    jobs = [job("1e-3", seed, 2.0, accuracy) for seed, accuracy in ((1, None), (2, 0.5), (3, 0.75))]
    for entry, count in zip(jobs[1:], (4, 8), strict=True):
        entry.record["evaluation"]["final"]["eval_accuracy_n"] = count
    lines = sweep_table(jobs).splitlines()
    assert "62.50 +- 17.68 (2 of 3)" in lines[2] and lines[2].count(" of 3)") == 1
    assert lines[-1] == "- lr1e-3: the seeds' accuracy was measured on 4 and 8 examples"


def test_doctests():
    assert doctest.testmod(module).failed == 0
