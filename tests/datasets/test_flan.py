"""The published data sets: a row of the hub's columns becomes exactly the published prompt and answer."""

from lora_one.data import load_dataset
from lora_one.data.encode import Encoder
from tests.helpers.datasets import hub_of, named_dataset


def test_flan_reads_the_first_rows_and_holds_the_last_of_them_out(monkeypatch, tokenizer):
    hub_of(monkeypatch, {"train": [{"inputs": f"{i}", "targets": "t"} for i in range(50)]})
    splits = load_dataset(named_dataset("flan_v2", "dataset.rows=22"), Encoder(tokenizer), 128)
    assert [e.prompt for e in splits.train_texts] == [f"{i}" for i in range(20)]
    assert [e.prompt for e in splits.validation_texts] == ["20", "21"]
