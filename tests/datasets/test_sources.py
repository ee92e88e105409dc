"""Rows to examples: templates, filters, splits, real files."""

import datetime
import decimal
import json

import pyarrow
import pyarrow.parquet
import pytest

from lora_one.data import load_dataset
from lora_one.data.encode import Encoder
from lora_one.datasets.sources import read_rows
from lora_one.errors import RunError, UsageError
from lora_one.types import Example
from tests.helpers.datasets import dataset_for, qa_rows, write_jsonl


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.csv", "rows.parquet"])
def test_local_formats_give_the_same_examples(tmp_path, tokenizer, name):
    rows = qa_rows(20)
    path = tmp_path / name
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix in (".csv", ".parquet"):
        import pandas

        frame = pandas.DataFrame(rows)
        frame.to_csv(path, index=False) if path.suffix == ".csv" else frame.to_parquet(path)
    else:
        write_jsonl(path, rows)
    splits = load_dataset(dataset_for("dataset=gsm8k", f"dataset.path={path}"), Encoder(tokenizer), 128)
    texts = splits.train_texts + splits.validation_texts
    assert texts == [Example(f"Q: How many is {i}?\nA: ", f"It is {i}.\n#### {i}", str(i)) for i in range(20)]


def test_shards_are_combined_and_other_duplicates_rejected(tmp_path, tokenizer):
    write_jsonl(tmp_path / "train-00000-of-00002.jsonl", qa_rows(4))
    write_jsonl(tmp_path / "train-00001-of-00002.jsonl", qa_rows(3))
    config = dataset_for(
        "dataset=gsm8k", f"dataset.path={tmp_path}", "dataset.train_size=7", "dataset.validation_size=null"
    )
    assert [e.gold for e in load_dataset(config, Encoder(tokenizer), 64).train_texts] == list("0123012")
    write_jsonl(tmp_path / "train.jsonl", qa_rows(2))
    with pytest.raises(UsageError, match="several files"):
        load_dataset(config, Encoder(tokenizer), 64)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.jsonl", '{"prompt": "a", "response": 0}\n{"prompt": "a", "response": false}\n', ["0", "false"]),
        ("a.jsonl", '{"prompt": "a", "response": "2018-01-01T10:00:00"}\n', ["2018-01-01T10:00:00"]),
        ("a.jsonl", '{"prompt": "a", "response": null}\n{"prompt": "a"}\n', ["", ""]),
        ("a.jsonl", '\ufeff{"prompt": "a", "response": "x\u2028y"}\r\n', ["x\u2028y"]),
        ("a.jsonl", '{"prompt": "a", "response": NaN}\n{"prompt": "a", "response": 1.5}\n', ["", "1.5"]),
        ("a.csv", "prompt,response\na,None\na,007\na,NA\n", ["None", "007", "NA"]),
        ("a.tsv", 'prompt\tresponse\na\t"quoted\n', ['"quoted']),
    ],
)
def test_cells_are_read_as_plain_text(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text, newline="")
    rows = read_rows(None, str(tmp_path / name), "train", ["prompt", "response"])
    assert [row["response"] for row in rows] == expected


def test_cells_of_parquet_that_json_does_not_have_are_plain_text(tmp_path):
    cells = [decimal.Decimal("12.50"), datetime.date(2024, 1, 2), float("nan")]
    for number, cell in enumerate(cells):
        table = pyarrow.table({"prompt": ["a"], "response": [cell]})
        pyarrow.parquet.write_table(table, tmp_path / f"{number}.parquet")
    files = [tmp_path / f"{number}.parquet" for number in range(len(cells))]
    rows = [read_rows(None, str(file), "train", ["prompt", "response"])[0] for file in files]
    assert [row["response"] for row in rows] == ["12.50", "2024-01-02", ""]


def test_half_of_a_character_is_named(tmp_path):
    """As in texts that were cut in the middle of an emoji."""
    (tmp_path / "a.jsonl").write_text('{"prompt": "a cut emoji \\ud83d", "response": "b"}\n')
    with pytest.raises(
        UsageError, match=r"column prompt has a text with half of a character, \\ud83d, after 'a cut emoji"
    ):
        read_rows(None, str(tmp_path / "a.jsonl"), "train", ["prompt", "response"])


@pytest.mark.parametrize("text", ["prompt,response\na,b,\n", "prompt,response\nWhat is 2, 3?,5\na,b\n"])
def test_rows_with_more_cells_than_the_header_are_refused(tmp_path, text):
    """pandas would take the first cell for a name of the row, and all columns would be shifted."""
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(RunError, match="the rows have more cells than the header, prompt, response"):
        read_rows(None, str(tmp_path / "a.csv"), "train", ["prompt", "response"])


def test_nested_cells_are_refused(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "response": ["b"]}])
    with pytest.raises(UsageError, match="column response must contain text, but a value is a list"):
        read_rows(None, str(path), "train", ["prompt", "response"])
