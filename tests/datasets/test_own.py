"""Rows to examples: templates, filters, splits, real files."""

from lora_one.data import load_dataset
from lora_one.data.encode import Encoder
from lora_one.types import Example
from tests.helpers.datasets import dataset_for, write_jsonl


def test_own_columns(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "mine.jsonl", [{"ask": f"a{i}", "reply": f"b{i}"} for i in range(10)])
    config = dataset_for("dataset=json", f"dataset.path={path}", "dataset.prompt=ask", "dataset.response=reply")
    splits = load_dataset(config, Encoder(tokenizer), 64)
    assert splits.train_texts == [Example(f"a{i}", f"b{i}") for i in range(9)]
    assert splits.validation_texts == [Example("a9", "b9")]


def test_own_data_holds_a_tenth_out(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "mine.jsonl", [{"prompt": f"a{i}", "response": "b"} for i in range(1000)])
    splits = load_dataset(dataset_for("dataset=json", f"dataset.path={path}"), Encoder(tokenizer), 64)
    assert (len(splits.train_texts), len(splits.validation_texts)) == (900, 100)
