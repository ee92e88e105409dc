"""Rows to examples: templates, filters, splits, real files."""

import gzip
import json

import pytest
from conftest import run_config, shared

from lora_one.data import load_dataset, split
from lora_one.data.encode import Encoder
from lora_one.datasets import meta_math
from lora_one.datasets.arithmetic import generate_meta_math
from lora_one.datasets.sources import read_rows
from lora_one.errors import UsageError
from lora_one.types import Example


def write(path, rows):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def dataset(*overrides):
    return run_config("model=tiny", *overrides).dataset


def qa_rows(count):
    return [{"question": f"How many is {i}?", "answer": f"It is {i}.\n#### {i}", "extra": i} for i in range(count)]


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
        write(path, rows)
    splits = load_dataset(dataset("dataset=gsm8k", f"dataset.path={path}"), Encoder(tokenizer), 128)
    texts = splits.train_texts + splits.validation_texts
    assert texts == [Example(f"Q: How many is {i}?\nA: ", f"It is {i}.\n#### {i}", str(i)) for i in range(20)]


def test_validation_is_held_out_in_proportion_and_order_is_the_file_s(tmp_path, tokenizer):
    path = write(tmp_path / "train.jsonl", qa_rows(100))
    splits = load_dataset(dataset("dataset=gsm8k", f"dataset.path={tmp_path}"), Encoder(tokenizer), 128)
    assert [e.gold for e in splits.train_texts] == [str(i) for i in range(94)]  # 7000 : 473
    assert [e.gold for e in splits.validation_texts] == [str(i) for i in range(94, 100)]
    shuffled = [
        load_dataset(
            dataset("dataset=gsm8k", f"dataset.path={path}", f"dataset.shuffle_seed={seed}"), Encoder(tokenizer), 128
        )
        for seed in (1, 1, 2)
    ]
    golds = [[e.gold for e in s.train_texts + s.validation_texts] for s in shuffled]
    assert golds[0] == golds[1] != golds[2] and sorted(golds[0], key=int) == [str(i) for i in range(100)]


def test_limits_cut_after_the_split(tmp_path, tokenizer):
    write(tmp_path / "train.jsonl", qa_rows(100))
    limits = ("dataset.max_train_samples=10", "dataset.max_eval_samples=2")
    splits = load_dataset(dataset("dataset=gsm8k", f"dataset.path={tmp_path}", *limits), Encoder(tokenizer), 128)
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


def test_meta_math_takes_the_gsm_rows_and_cuts_the_response():
    rows = generate_meta_math(600, seed=0)
    examples = [example for row in rows if (example := meta_math.example_of(row))]
    kept = [row for row in rows if "GSM" in row["type"]]
    assert 0 < len(examples) == len(kept) < 600
    for row, example in zip(kept, examples, strict=True):
        assert example.prompt == f"Q: {row['query']}\nA: "
        assert "The answer is" not in example.response
        assert row["response"].startswith(example.response)
        assert example.response.endswith(f"#### {example.gold}")


def test_meta_math_drops_long_rows_by_the_run_s_own_tokenizer(tmp_path, tokenizer):
    rows = generate_meta_math(500, seed=0)
    long = [dict(row, query=row["query"] + " and" * 600) for row in rows[:30]]
    write(tmp_path / "train.jsonl", rows + long)
    splits = load_dataset(dataset("dataset=meta_math", f"dataset.path={tmp_path}"), Encoder(tokenizer), 1024)
    gsm = sum("GSM" in row["type"] for row in rows)
    assert splits.counts["too_long"] == sum("GSM" in row["type"] for row in long) > 0
    assert len(splits.train_texts) + len(splits.validation_texts) == gsm
    assert len(splits.validation_texts) == gsm // 11  # 100k : 10k


def test_own_columns(tmp_path, tokenizer):
    path = write(tmp_path / "mine.jsonl", [{"ask": f"a{i}", "reply": f"b{i}"} for i in range(10)])
    config = dataset("dataset=json", f"dataset.path={path}", "dataset.prompt=ask", "dataset.response=reply")
    splits = load_dataset(config, Encoder(tokenizer), 64)
    assert splits.train_texts == [Example(f"a{i}", f"b{i}") for i in range(9)]
    assert splits.validation_texts == [Example("a9", "b9")]


def test_shards_are_read_together_and_other_doublets_refused(tmp_path, tokenizer):
    write(tmp_path / "train-00000-of-00002.jsonl", qa_rows(4))
    write(tmp_path / "train-00001-of-00002.jsonl", qa_rows(3))
    config = dataset(
        "dataset=gsm8k", f"dataset.path={tmp_path}", "dataset.train_size=7", "dataset.validation_size=null"
    )
    assert [e.gold for e in load_dataset(config, Encoder(tokenizer), 64).train_texts] == list("0123012")
    write(tmp_path / "train.jsonl", qa_rows(2))
    with pytest.raises(UsageError, match="several files"):
        load_dataset(config, Encoder(tokenizer), 64)


def test_arithmetic_problems_are_distinct_and_never_in_both_splits(tokenizer):
    splits = load_dataset(dataset("dataset.train_size=300", "dataset.validation_size=100"), Encoder(tokenizer), 128)
    train, validation = ({e.prompt for e in texts} for texts in (splits.train_texts, splits.validation_texts))
    assert len(train) == 300 and len(validation) == 100 and not train & validation
    assert splits.counts["train"] == {"whole": 300, "shortened": 0, "dropped": 0}


def test_real_gsm8k(sentencepiece_tokenizer):
    config = dataset("dataset=gsm8k", f"dataset.path={shared('data/gsm8k')}", "dataset.max_train_samples=100")
    splits = load_dataset(config, Encoder(sentencepiece_tokenizer), 384)
    assert splits.counts["rows"] == 7473 and len(splits.train_texts) == 100 and len(splits.validation_texts) == 473
    assert all(example.gold and "####" in example.response for example in splits.train_texts)
    counts = splits.counts["train"]
    assert counts["shortened"] > 0 and counts["whole"] + counts["shortened"] + counts["dropped"] == 100


def test_real_meta_math_rows():
    path = shared("data/instruct/metamathqa_2rows.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    examples = [meta_math.example_of(row) for row in rows]
    assert [example is not None for example in examples] == ["GSM" in row["type"] for row in rows]
    for row, example in zip(rows, examples, strict=True):
        if example is not None:
            assert example.response.endswith(f"#### {example.gold}") and row["query"] in example.prompt


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.jsonl", '{"prompt": "a", "response": 0}\n{"prompt": "a", "response": false}\n', ["0", "false"]),
        ("a.jsonl", '{"prompt": "a", "response": "2018-01-01T10:00:00"}\n', ["2018-01-01T10:00:00"]),
        ("a.jsonl", '{"prompt": "a", "response": null}\n{"prompt": "a"}\n', ["", ""]),
        ("a.jsonl", '\ufeff{"prompt": "a", "response": "x\u2028y"}\r\n', ["x\u2028y"]),
        ("a.csv", "prompt,response\na,None\na,007\na,NA\n", ["None", "007", "NA"]),
        ("a.tsv", 'prompt\tresponse\na\t"quoted\n', ['"quoted']),
    ],
)
def test_cells_are_the_text_they_are(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text, newline="")
    rows = read_rows(None, str(tmp_path / name), "train", ["prompt", "response"])
    assert [row["response"] for row in rows] == expected


def test_nested_cells_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "response": ["b"]}])
    with pytest.raises(UsageError, match="column response holds lists, but text is needed"):
        read_rows(None, str(path), "train", ["prompt", "response"])


def test_own_data_holds_a_tenth_out(tmp_path, tokenizer):
    path = write(tmp_path / "mine.jsonl", [{"prompt": f"a{i}", "response": "b"} for i in range(1000)])
    splits = load_dataset(dataset("dataset=json", f"dataset.path={path}"), Encoder(tokenizer), 64)
    assert (len(splits.train_texts), len(splits.validation_texts)) == (900, 100)
