"""What is checked once the data is loaded, before anything is computed."""

from types import SimpleNamespace

import pytest

from lora_one.distributed import Processes
from lora_one.errors import RunError, UsageError
from lora_one.records.folder import RunFolder
from lora_one.runs.parts import check_before_loading, check_model_and_data
from tests.helpers.models import random_llama
from tests.helpers.runs import run_config


@pytest.mark.parametrize("name", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_an_automatic_restart_does_not_delete_a_resume_point(name, tmp_path, monkeypatch):
    run = run_config("overwrite=true")
    check_before_loading(run, RunFolder(tmp_path))
    (tmp_path / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    monkeypatch.setenv(name, "0")
    check_before_loading(run, RunFolder(tmp_path))
    monkeypatch.setenv(name, "1")
    with pytest.raises(RunError, match=r"overwrite=true would delete .* in this automatic restart"):
        check_before_loading(run, RunFolder(tmp_path))


def test_more_processes_than_examples_are_refused(monkeypatch):
    """In the words of the dry run with plan.processes."""
    monkeypatch.setattr(Processes, "current", classmethod(lambda cls: cls(0, 5)))
    splits = SimpleNamespace(train=[None] * 4, validation=[])
    parts = SimpleNamespace(run=run_config("model.warmup=0"), splits=splits)
    with pytest.raises(UsageError, match=r"^5 processes are more than the 4 training examples: start at most 4"):
        check_model_and_data(parts, random_llama())
    splits.train.append(None)
    check_model_and_data(parts, random_llama())
