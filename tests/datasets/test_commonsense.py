"""The published data sets: a row of the hub's columns becomes exactly the published prompt and answer."""

import json

import pytest

from lora_one.data import load_dataset
from lora_one.data.encode import Encoder
from lora_one.datasets import DATASETS
from lora_one.errors import UsageError
from lora_one.records.provenance import local_fingerprints
from tests.helpers.datasets import ALPACA, named_dataset
from tests.helpers.paths import shared

COMMONSENSE = ALPACA


def test_commonsense_folders_are_read_together_in_the_evaluation_s_prompt(tmp_path, tokenizer):
    for name in ("piqa", "boolq"):
        rows = [{"instruction": "Add.", "input": "", "output": f"the correct answer is {name}", "answer": name}]
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.json").write_text(json.dumps(rows))
    found = DATASETS["commonsense_reasoning"].train(named_dataset("commonsense_reasoning", f"dataset.path={tmp_path}"))
    assert [(e.prompt, e.response) for e in found] == [
        (COMMONSENSE, "the correct answer is boolq"),
        (COMMONSENSE, "the correct answer is piqa"),
    ]
    before = local_fingerprints({"dataset": {"name": "commonsense_reasoning", "path": str(tmp_path)}}, None)
    (tmp_path / "piqa" / "train.json").write_text("[]")
    assert before != local_fingerprints({"dataset": {"name": "commonsense_reasoning", "path": str(tmp_path)}}, None)
    with pytest.raises(UsageError, match=r"has no subfolder with a train\.json"):
        DATASETS["commonsense_reasoning"].train(
            named_dataset("commonsense_reasoning", f"dataset.path={tmp_path / 'piqa'}")
        )
    with pytest.raises(UsageError, match=r"add dataset\.path="):
        named_dataset("commonsense_reasoning")


def test_real_commonsense_rows(tokenizer):
    path = shared("data/commonsense")
    splits = load_dataset(named_dataset("commonsense_reasoning", f"dataset.path={path}"), Encoder(tokenizer), 1024)
    assert splits.counts["rows"] == 9427 + 1119 + 2251 + 4957 and len(splits.validation_texts) == 120
    assert len(splits.train_texts) == 17754 - 120
    assert {e.response for e in splits.validation_texts[:50]} > {"the correct answer is true"}  # shuffled over the sets
