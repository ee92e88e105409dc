"""Rows to examples: templates, filters, splits, real files."""

import re

import pytest

from lora_one.data import load_dataset, split
from lora_one.data.encode import Encoder
from lora_one.errors import RunError
from lora_one.types import Example
from tests.helpers.datasets import dataset_for, qa_rows, write_jsonl


def test_validation_is_held_out_in_proportion_and_order_is_the_file_s(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "train.jsonl", qa_rows(100))
    splits = load_dataset(dataset_for("dataset=gsm8k", f"dataset.path={tmp_path}"), Encoder(tokenizer), 128)
    assert [e.gold for e in splits.train_texts] == [str(i) for i in range(94)]  # 7000 : 473
    assert [e.gold for e in splits.validation_texts] == [str(i) for i in range(94, 100)]
    shuffled = [
        load_dataset(
            dataset_for("dataset=gsm8k", f"dataset.path={path}", f"dataset.shuffle_seed={seed}"),
            Encoder(tokenizer),
            128,
        )
        for seed in (1, 1, 2)
    ]
    golds = [[e.gold for e in s.train_texts + s.validation_texts] for s in shuffled]
    assert golds[0] == golds[1] != golds[2] and sorted(golds[0], key=int) == [str(i) for i in range(100)]


def test_limits_cut_after_the_split(tmp_path, tokenizer):
    write_jsonl(tmp_path / "train.jsonl", qa_rows(100))
    limits = ("dataset.max_train_samples=10", "dataset.max_eval_samples=2")
    splits = load_dataset(dataset_for("dataset=gsm8k", f"dataset.path={tmp_path}", *limits), Encoder(tokenizer), 128)
    assert [e.gold for e in splits.train_texts] == [str(i) for i in range(10)]
    assert [e.gold for e in splits.validation_texts] == ["94", "95"]


@pytest.mark.parametrize(
    ("rows", "sizes", "expected"),
    [
        (10, (6, 2), (6, 2)),
        (10, (100, 10), (10, 0)),
        (110, (1000, 100), (100, 10)),
        (5, (None, 2), (3, 2)),
        (50, (None, 0.1), (45, 5)),
    ],
)
def test_split_sizes(rows, sizes, expected):
    examples = [Example(str(i), str(i)) for i in range(rows)]
    train, validation = split(examples, *sizes)
    assert (len(train), len(validation)) == expected
    assert not set(train) & set(validation)


def test_arithmetic_problems_are_distinct_and_never_in_both_splits(tokenizer):
    splits = load_dataset(dataset_for("dataset.train_size=300", "dataset.validation_size=100"), Encoder(tokenizer), 128)
    train, validation = ({e.prompt for e in texts} for texts in (splits.train_texts, splits.validation_texts))
    assert len(train) == 300 and len(validation) == 100 and not train & validation
    assert splits.counts["train"] == {"whole": 300, "shortened": 0, "dropped": 0}


def rows_for(tmp_path, rows, *changes):
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    return dataset_for("dataset=json", f"dataset.path={path}", *changes)


def test_removed_and_cut_rows_and_a_validation_that_vanishes_are_printed(tmp_path, tokenizer, capsys):
    rows = [{"prompt": f"a{i}", "response": "b"} for i in range(26)]
    rows += [{"prompt": "a", "response": ""}, {"prompt": "a", "response": "b " * 40}]
    rows += [{"prompt": "a " * 40, "response": "b"}, {"prompt": "a " * 200, "response": "b"}]
    config = rows_for(tmp_path, rows, "dataset.validation_size=0.01", "dataset.max_tokens=100")
    load_dataset(config, Encoder(tokenizer), 32)
    said = capsys.readouterr().out
    assert "1 of 30 rows have 100 tokens or more and were removed" in said
    assert "2 of 29 training examples were dropped" in said
    assert "1 of 29 training examples were cut to model.max_length=32" in said
    assert "no validation example, because dataset.validation_size=0.01 of 30 rows" in said
    load_dataset(rows_for(tmp_path, rows[:26]), Encoder(tokenizer), 32)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ("dataset.validation_size=40", "30 are held out by dataset.validation_size=40"),
        ("dataset.max_tokens=2", "30 have dataset.max_tokens=2 tokens or more"),
    ],
)
def test_the_key_that_leaves_no_row_is_named_and_no_other(change, cause, tmp_path, tokenizer):
    config = rows_for(tmp_path, [{"prompt": f"a{i}", "response": "b"} for i in range(30)], change)
    with pytest.raises(RunError) as refused:
        load_dataset(config, Encoder(tokenizer), 64)
    keys = set(re.findall(r"dataset\.\w+", str(refused.value)))
    assert cause in str(refused.value) and keys == {change.partition("=")[0]}
