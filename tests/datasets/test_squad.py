"""The published data sets: a row of the hub's columns becomes exactly the published prompt and answer."""

import json

import pytest

from lora_one.datasets import DATASETS
from lora_one.errors import UsageError
from tests.helpers.datasets import named_dataset


def test_squad_answers_of_another_form_are_refused(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"question": "a", "context": "b", "answers": "c"}))
    with pytest.raises(UsageError, match="train row 1: column answers must be"):
        DATASETS["squad"].train(named_dataset("squad", f"dataset.path={tmp_path}"))
