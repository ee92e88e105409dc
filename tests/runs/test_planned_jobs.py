"""The jobs of a sweep are those that Hydra runs, in its order."""

import doctest
from random import Random

from lora_one.runs import planned_jobs as module
from lora_one.runs.planned_jobs import Differing, planned_jobs


def test_last_key_changes_fastest_and_brackets_and_quotes_do_not_split():
    jobs = planned_jobs(["init=lora,svd", "++seed=range(1,3)", "peft.lora_target_modules=[q,v]", "--multirun"])
    assert [(job["init"], job["seed"]) for job in jobs] == [("lora", "1"), ("lora", "2"), ("svd", "1"), ("svd", "2")]
    assert {job["peft.lora_target_modules"] for job in jobs} == {"[q,v]"}


def test_without_a_sweep_with_a_mistake_a_glob_a_shuffle_or_another_sweeper_there_is_no_plan():
    for arguments in (
        ["-m", "hydra/sweeper=optuna", "init=choice(lora,svd)"],
        ["seed=1"],
        ["-m", "x==,"],
        ["-m", "init=glob(*)"],
        ["-m", "seed=shuffle(1,2)"],
    ):
        assert planned_jobs(arguments) == []


def test_a_key_with_shuffle_in_its_name_and_settings_of_hydra_leave_the_plan():
    """Those of Hydra are not among the overrides that it gives to a job."""
    jobs = planned_jobs(["-m", "dataset.shuffle_seed=1,2", "hydra/launcher=slurm", "++hydra.launcher.partition=gpu"])
    assert jobs == [{"dataset.shuffle_seed": "1"}, {"dataset.shuffle_seed": "2"}]


def test_doctests():
    assert doctest.testmod(module).failed == 0


def test_keys_that_differ_are_known_after_each_job():
    """By their definition: a key with two values, or one that some job lacks."""
    random = Random(0)
    jobs = [{key: random.choice("ab") for key in "wxyz" if random.random() < 0.9} | {"a": "1"} for _ in range(12)]
    found = Differing()
    for count, job in enumerate(jobs, start=1):
        found.add(job)
        keys = dict.fromkeys(key for earlier in jobs[:count] for key in earlier)
        assert found.keys == [key for key in keys if len({earlier.get(key) for earlier in jobs[:count]}) > 1]
    assert set(found.keys) == set("wxyz")
