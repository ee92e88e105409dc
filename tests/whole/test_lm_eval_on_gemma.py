"""Gemma 3 270M: lm_eval gives the same completions of GSM8K, and the same choices of MMLU, example by example."""

import csv
import importlib.util
import json
from pathlib import Path

import pytest

from lora_one.evaluation.command import main
from lora_one.evaluation.mmlu import LETTERS
from lora_one.models import load_model, load_tokenizer
from tests.helpers.lm_eval import samples_of
from tests.helpers.paths import real_model, shared

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not here"),
]
NEW_TOKENS = 128
SUBJECTS = ("abstract_algebra", "anatomy", "business_ethics", "high_school_geography", "world_religions")


def gemma():
    return str(real_model("gemma-3-270m-hf"))


def ours(task, folder, *options):
    assert main(task, [f"--model_name={gemma()}", "--dtype=fp32", f"--output_dir={folder}", *options]) == 0
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def on_rows(task, rows, folder):
    """The configuration of a task that reads these rows."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}, "test_split": "test"}
    return task | {"dataset_path": "json", "dataset_name": None, **data}


def test_gsm8k_after_eight_examples(tmp_path, capsys):
    """lm_eval's own task gsm8k_cot, with its strict and its flexible score, on the first 20 problems."""
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    data = shared("data/gsm8k/test.jsonl")
    lines = ours(
        "gsm8k", tmp_path, f"--data_path={data}", "--num_fewshot=8", "--limit=20", f"--max_new_tokens={NEW_TOKENS}"
    )
    task = load_yaml(Path(lm_eval.tasks.__file__).parent / "gsm8k/gsm8k-cot.yaml")
    task["generation_kwargs"]["max_gen_toks"] = NEW_TOKENS
    task["fewshot_config"]["sampler"] = "first_n"
    rows = [json.loads(line) for line in data.read_text().splitlines()[:20]]
    model = load_model(gemma(), dtype="fp32"), load_tokenizer(gemma())
    samples = samples_of([on_rows(task, rows, tmp_path)], *model, 8, batch_size=4)["gsm8k_cot"]
    scores = {"strict-match": "correct_official", "flexible-extract": "correct_flexible"}
    for name, field in scores.items():
        found = [sample for sample in samples if sample["filter"] == name]
        assert [sample["resps"][0][0] for sample in found] == [line["completion"] for line in lines]
        assert [bool(sample["exact_match"]) for sample in found] == [line[field] for line in lines]
    with capsys.disabled():
        counts = {field: sum(line[field] for line in lines) for field in scores.values()}
        print(f"GSM8K, 8 solved examples: {len(lines)} equal completions, {counts}")


def test_mmlu_after_five_examples(tmp_path, capsys):
    """The first 20 questions of five subjects, with our prompt: lm_eval's has one space where the original has two."""
    source = shared("data/mmlu")
    for split in ("dev", "test"):
        (tmp_path / "data" / split).mkdir(parents=True)
        for subject in SUBJECTS:
            with (source / split / f"{subject}_{split}.csv").open(newline="") as stream:
                rows = list(csv.reader(stream))[:20]
            with (tmp_path / "data" / split / f"{subject}_{split}.csv").open("w", newline="") as stream:
                csv.writer(stream).writerows(rows)
    lines = ours("mmlu", tmp_path, f"--data_path={tmp_path / 'data'}")
    assert len(lines) == 100 and not any("shots_lost" in line for line in lines)
    task = {
        "task": "letters",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": list(LETTERS),
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}],
    }
    rows = [{"prompt": line["prompt"], "gold": line["gold"]} for line in lines]
    model = load_model(gemma(), dtype="fp32"), load_tokenizer(gemma())
    samples = samples_of([on_rows(task, rows, tmp_path)], *model, batch_size=1)["letters"]
    largest = 0.0
    for sample, line in zip(samples, lines, strict=True):
        theirs = [response[0][0] for response in sample["resps"]]
        found = [line["log_likelihoods"][letter] for letter in LETTERS]
        assert found == pytest.approx(theirs, abs=1e-2)
        assert LETTERS[theirs.index(max(theirs))] == line["prediction"] and sample["acc"] == line["correct"]
        largest = max(largest, *(abs(one - other) for one, other in zip(found, theirs, strict=True)))
    with capsys.disabled():
        correct = sum(line["correct"] for line in lines)
        print(f"MMLU, 5 solved examples: {correct} of {len(lines)} correct, difference at most {largest:.1e} nats")
