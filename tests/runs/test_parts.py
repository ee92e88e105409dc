"""What is checked once the data is loaded, before anything is computed."""

from types import SimpleNamespace

import pytest

from lora_one.distributed import Processes
from lora_one.errors import UsageError
from lora_one.runs.parts import check_model_and_data
from tests.helpers.models import random_llama
from tests.helpers.runs import run_config


def test_more_processes_than_examples_are_refused(monkeypatch):
    """In the words of the dry run with plan.processes."""
    monkeypatch.setattr(Processes, "current", classmethod(lambda cls: cls(0, 5)))
    splits = SimpleNamespace(train=[None] * 4, validation=[])
    parts = SimpleNamespace(run=run_config("model.warmup=0"), splits=splits)
    with pytest.raises(UsageError, match=r"^5 processes are more than the 4 training examples: start at most 4"):
        check_model_and_data(parts, random_llama())
    splits.train.append(None)
    check_model_and_data(parts, random_llama())
