"""lm_eval gives the same completions and the same choices, example by example, on local tasks and the bundled model."""

import importlib.util
import json
import random

import pytest

from lora_one.datasets.arithmetic import generate
from lora_one.evaluation.command import main
from lora_one.evaluation.gsm8k import parse
from lora_one.evaluation.mmlu import LETTERS
from lora_one.models import BUNDLED, load_model, load_tokenizer
from tests.helpers.lm_eval import samples_of

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not here: pip install 'lora-one[lm-eval]'"
)
PROBLEMS = 200
NEW_TOKENS = 64


def by_lm_eval(task, rows, tmp_path):
    """Samples of an inline task over these rows, in their order."""
    data = tmp_path / f"{task['task']}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task |= {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    model, tokenizer = load_model(str(BUNDLED / "tiny"), dtype="fp32"), load_tokenizer(str(BUNDLED / "tiny"))
    samples = samples_of([task], model, tokenizer)[task["task"]]
    assert len(samples) == len(rows)
    return samples


def ours(task, tmp_path, *arguments):
    folder = tmp_path / "ours"
    assert main(task, [f"--model_name={BUNDLED / 'tiny'}", "--dtype=fp32", f"--output_dir={folder}", *arguments]) == 0
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_completions_are_the_same(tmp_path):
    """GSM8K's form; half of the problems are of a family that the model answers wrong."""
    rows = generate(["comparison_total"], PROBLEMS // 2, 5) + generate(["reverse_comparison_total"], PROBLEMS // 2, 5)
    data = tmp_path / "test.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = ours("gsm8k", tmp_path, f"--data_path={data}", f"--max_new_tokens={NEW_TOKENS}", "--batch_size=32")
    task = {
        "task": "problems",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{gold}}",
        "generation_kwargs": {"until": ["\n\n\n"], "do_sample": False, "max_gen_toks": NEW_TOKENS},
        "metric_list": [{"metric": "exact_match"}],
    }
    samples = by_lm_eval(task, [{"prompt": line["prompt"], "gold": line["gold"]} for line in lines], tmp_path)
    assert [sample["resps"][0][0] for sample in samples] == [line["completion"] for line in lines]
    right = [
        parse(sample["resps"][0][0]) == parse(f"#### {line['gold']}")
        for sample, line in zip(samples, lines, strict=True)
    ]
    assert right == [line["correct"] for line in lines]
    assert 0.2 <= sum(right) / PROBLEMS <= 0.8


def test_choices_are_the_same(tmp_path):
    """MMLU's form, after two solved examples: the same letter, and log-likelihoods that agree."""
    draw = random.Random(3)

    def question(number):
        one, two = draw.randrange(10, 50), draw.randrange(2, 10)
        options = draw.sample(range(20, 99), 4)
        return [f"What is {one} + {two} ({number})?", *map(str, options), draw.choice(LETTERS)]

    for split, size in (("test", PROBLEMS), ("dev", 2)):
        (tmp_path / "mmlu" / split).mkdir(parents=True)
        table = "".join(",".join(question(number)) + "\n" for number in range(size))
        (tmp_path / "mmlu" / split / f"virology_{split}.csv").write_text(table)
    lines = ours("mmlu", tmp_path, f"--data_path={tmp_path / 'mmlu'}", "--ntrain=2", "--batch_size=32")
    assert not any("shots_lost" in line for line in lines), "lm_eval cuts otherwise where the context ends"
    task = {
        "task": "choices",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": list(LETTERS),
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}],
    }
    rows = [{"prompt": line["prompt"], "gold": line["gold"]} for line in lines]
    samples = by_lm_eval(task, rows, tmp_path)
    for sample, line in zip(samples, lines, strict=True):
        values = [response[0][0] for response in sample["resps"]]
        assert values == pytest.approx([line["log_likelihoods"][letter] for letter in LETTERS], abs=1e-3)
        assert LETTERS[values.index(max(values))] == line["prediction"]
    assert 0.2 <= sum(line["correct"] for line in lines) / PROBLEMS <= 0.8
