"""Processes on several machines are refused if their code, libraries, settings or files differ."""

import re

import pytest

from lora_one.distributed import Processes
from lora_one.errors import UsageError
from lora_one.records import agreement
from lora_one.records.agreement import refuse_differences
from lora_one.records.folder import locate
from tests.helpers.runs import run_config


@pytest.fixture
def located():
    return locate(run_config())


def among_three(monkeypatch, located, change):
    """What process 0 of three does, where ``change`` makes the facts of process 2 different."""

    def gathered(self, value):
        facts, _ = value
        return [value, value, (change(dict(facts)), "node7")]

    monkeypatch.setattr(Processes, "gathered", gathered)
    monkeypatch.setattr(Processes, "current", classmethod(lambda cls: cls(0, 3)))
    refuse_differences(located)


def test_processes_that_agree_are_accepted(located, monkeypatch):
    among_three(monkeypatch, located, dict)
    monkeypatch.undo()
    monkeypatch.setattr(agreement, "versions", None)  # a single process asks for nothing
    refuse_differences(located)


@pytest.mark.parametrize(
    "name",
    ["the version of torch", "the source code", "the content of model.name", "the configuration", "the setting seed"],
)
def test_a_difference_is_named(located, monkeypatch, name):
    with pytest.raises(UsageError, match=rf"differ in {name}: \S+ in process 0 on .*, other in process 2 on node7: "):
        among_three(monkeypatch, located, lambda facts: facts | {name: "other"})


def test_the_tasks_of_one_srun_that_were_meant_as_several_runs_are_refused(monkeypatch):
    """srun -n3 bash -c 'python run_exp.py seed=$SLURM_PROCID': the hash is that of every seed."""

    def gathered(self, value):
        monkeypatch.undo()
        return [(facts_of(monkeypatch, seed), f"node{seed}") for seed in range(3)]

    with pytest.raises(UsageError, match=r"the setting seed: 0 in process 0 on node0, 1 in process 1 .* are one run"):
        refuse_with(monkeypatch, gathered, locate(run_config("seed=0")))


def refuse_with(monkeypatch, gathered, located):
    monkeypatch.setattr(Processes, "gathered", gathered)
    monkeypatch.setattr(Processes, "current", classmethod(lambda cls: cls(0, 3)))
    refuse_differences(located)


def facts_of(monkeypatch, seed):
    """The facts of a process with this seed."""
    found = []
    with monkeypatch.context() as patch:
        refuse_with(patch, lambda _, value: found.append(value) or [value], locate(run_config(f"seed={seed}")))
    return found[0][0]


def test_a_file_that_one_process_lacks_is_a_difference(located, monkeypatch):
    def without(facts):
        return {name: value for name, value in facts.items() if "content" not in name}

    with pytest.raises(UsageError) as refused:
        among_three(monkeypatch, located, without)
    assert re.search(r"the content of model\.name: \w+ in process 0 .*, None in process 2", str(refused.value))
