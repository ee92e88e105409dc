"""Rows to examples: templates, filters, splits, real files."""

import json

from lora_one.data import load_dataset
from lora_one.data.encode import Encoder
from lora_one.datasets import meta_math
from lora_one.datasets.arithmetic import generate_meta_math
from tests.helpers.datasets import dataset_for, write_jsonl
from tests.helpers.paths import shared


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
    write_jsonl(tmp_path / "train.jsonl", rows + long)
    splits = load_dataset(dataset_for("dataset=meta_math", f"dataset.path={tmp_path}"), Encoder(tokenizer), 1024)
    gsm = sum("GSM" in row["type"] for row in rows)
    assert splits.counts["too_long"] == sum("GSM" in row["type"] for row in long) > 0
    assert len(splits.train_texts) + len(splits.validation_texts) == gsm
    assert len(splits.validation_texts) == gsm // 11  # 100k : 10k


def test_real_meta_math_rows():
    path = shared("data/instruct/metamathqa_2rows.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    examples = [meta_math.example_of(row) for row in rows]
    assert [example is not None for example in examples] == ["GSM" in row["type"] for row in rows]
    for row, example in zip(rows, examples, strict=True):
        if example is not None:
            assert example.response.endswith(f"#### {example.gold}") and row["query"] in example.prompt
