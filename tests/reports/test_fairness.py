"""What is shown as equal is compared run by run."""

from dataclasses import replace

import pytest

from lora_one.reports.compare import Run
from lora_one.reports.fairness import fairness

COMPARISON = {"tuning_seeds": [1], "seeds": [2, 3], "unequal_budgets": None}


def run(method, seed=2, stage="final", **changes):
    identity = {"model": "m", "processes": 1, "versions": {"torch": "2"}} | changes.pop("identity", {})
    return Run(
        method,
        stage,
        {"a": 1.0},
        seed,
        "folder",
        **{"steps": 10, "tokens": 90, "git_commit": "c"} | changes,
        identity=identity,
    )


RUNS = [run(method, seed) for method in "ab" for seed in (2, 3)]
RUNS += [run(method, 1, "tuning") for method in "ab"]


def table(runs, comparison=COMPARISON):
    return {line[0]: tuple(line[1:]) for line in fairness(runs, comparison)[1:]}


def test_equal_runs_are_equal_in_everything():
    found = table(RUNS)
    assert found["model"] == ("m", "yes") and found["package versions"] == ("torch 2", "yes")
    assert found["steps"] == ("10", "yes") and found["tuning runs"] == ("1", "yes")
    assert found["tuning and reported seeds"] == ("apart", "yes")
    assert all(shown.startswith("yes") for _, shown in found.values())


@pytest.mark.parametrize(
    ("change", "name", "shown"),
    [
        ({"identity": {"model": "other"}}, "model", "m (6 x); other (1 x)"),
        ({"identity": {"processes": 2}}, "processes", "1 (6 x); 2 (1 x)"),
        ({"identity": {"versions": {"torch": "3"}}}, "package versions", "torch 2 (6 x); torch 3 (1 x)"),
        ({"git_commit": "d"}, "commit", "c (6 x); d (1 x)"),
        ({"tokens": 91}, "tokens", "90 to 91, by seed"),
        ({"stage": "tuning", "seed": 1}, "tuning runs", "1 (1 x); 2 (1 x)"),
    ],
)
def test_one_different_run_is_shown(change, name, shown):
    found = table([*RUNS, run("b", **change)])
    assert found[name][0] == shown and found[name][1].startswith("no")


def test_points_that_could_not_run_are_not_tuning_runs():
    found = table([*RUNS, replace(run("b", 1, "tuning"), path=None, error="peft.lora_r=5000 exceeds 32")])
    assert found["tuning runs"] == ("1", "yes")


@pytest.mark.parametrize("commit", ["c0ffee+changes", None])
def test_a_changed_tree_is_no_commit(commit):
    """What was changed may differ between the runs; code is the hash of the source files."""
    runs = [replace(one, git_commit=commit) for one in RUNS]
    assert table(runs)["commit"] == (str(commit), "not known")
    code = [replace(one, identity=one.identity | {"code": place < 2}) for place, one in enumerate(runs)]
    assert table(code)["code"][1] == "no"


def test_seeds_that_tune_and_are_reported_and_the_reason_of_unequal_budgets_are_shown():
    found = table([*RUNS, run("b", 1, "tuning")], {"tuning_seeds": [2], "seeds": [2, 3], "unequal_budgets": "because"})
    assert found["tuning and reported seeds"] == ("2 tune and are reported", "no")
    assert found["tuning runs"][1] == "no (because)"


def test_the_reason_of_shared_seeds_is_shown():
    found = table(RUNS, {"tuning_seeds": [2], "seeds": [2, 3], "shared_seeds": "a small trial"})
    assert found["tuning and reported seeds"] == ("2 tune and are reported", "no (a small trial)")


def test_the_method_of_each_row_is_that_of_its_runs():
    runs = [replace(one, identity=one.identity | {"method": f"start {one.method}"}) for one in RUNS]
    found = table(runs)
    assert found["method of a"] == ("start a", "yes") and found["method of b"] == ("start b", "yes")
    found = table([*runs, run("b", identity={"method": "start a"})])
    assert found["method of b"] == ("start b (2 x); start a (1 x)", "no")
    tuned = table([*runs, run("b", 1, "tuning", identity={"method": "other optimizer"})])
    assert tuned["method of b"] == ("start b", "yes"), "a key of the grid differs between the tuning runs alone"


def test_a_failed_run_is_not_compared():
    assert table([*RUNS, replace(run("b", tokens=91), error="stopped")])["tokens"] == ("90", "yes")
