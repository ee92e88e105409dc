"""Which kind of model answers which benchmark; the others are refused with a line that says what to give."""

import csv
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lora_one.evaluation.command import main
from tests.helpers.models import folder_of, random_llama, random_roberta, random_t5


@pytest.fixture
def data(tmp_path):
    """A question of each benchmark, in the form that it reads: benchmark -> options."""
    place = tmp_path / "data"
    rows = {
        "gsm8k": {"question": "1 + 1?", "answer": "#### 2"},
        "humaneval": {"task_id": "t", "prompt": "def f():\n", "entry_point": "f", "test": "def check(f): pass\n"},
        "math": {"problem": "1 + 1?", "solution": r"\boxed{2}"},
        "commonsense": {"instruction": "Is it so?", "answer": "true"},
        "glue": {"sentence": "fine", "label": "1"},
    }
    for split in ("dev", "test"):
        (place / split).mkdir(parents=True)
        with (place / split / f"virology_{split}.csv").open("w", newline="") as stream:
            csv.writer(stream).writerow(["1 + 1?", "1", "2", "3", "4", "B"])
    options = {"mmlu": ["--data_path", str(place), "--ntrain=1"]}
    for task, row in rows.items():
        (place / f"{task}.jsonl").write_text(json.dumps(row) + "\n")
        options[task] = ["--data_path", str(place / f"{task}.jsonl")]
    options["humaneval"] += ["--no_score"]
    options["glue"] += ["--dataset=sst2"]
    options["commonsense"] += ["--dataset=boolq"]
    return options


@pytest.mark.parametrize("task", ["gsm8k", "humaneval", "math", "commonsense", "mmlu"])
def test_classification_head_is_evaluated_only_on_glue(task, data, tokenizer, tmp_path, capsys):
    if task == "math":
        pytest.importorskip("math_verify", reason="MATH needs math-verify: pip install -e .[math]")
    base = folder_of(random_roberta(len(tokenizer)), tokenizer, tmp_path / "base")
    assert main(task, ["--model_name", str(base), "--output_dir", str(tmp_path / "out"), *data[task]]) == 2
    assert "classification head and cannot generate text" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["gsm8k"],
        ["gsm8k", "--temperature=1"],
        ["commonsense"],
        ["mmlu"],
        ["glue", "--first_token"],
        ["glue", "head"],
    ],
    ids=" ".join,
)
def test_logits_that_are_not_finite_are_an_error(arguments, data, tokenizer, tmp_path, capsys):
    """As with an overflow in fp16: argmax would still return some token."""
    task, *options = arguments
    head = "head" in options
    model = random_roberta(len(tokenizer)) if head else random_llama(len(tokenizer))
    (model.classifier.out_proj if head else model.model.norm).weight.data.fill_(float("nan"))
    base = folder_of(model, tokenizer, tmp_path / "base")
    options = ["--model_name", str(base), *data[task], *options[: 0 if head else None]]
    assert main(task, [*options, "--output_dir", str(tmp_path / "out")]) == 1
    assert "try --dtype=fp32, or check the checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["mmlu"], ["commonsense", "--likelihood", "--greedy"]], ids=" ".join)
def test_likelihoods_need_a_causal_model(arguments, data, tokenizer, tmp_path, capsys):
    base = folder_of(random_t5(len(tokenizer)), tokenizer, tmp_path / "base")
    task, *options = arguments
    options = [*options, *data[task], "--model_name", str(base), "--output_dir", str(tmp_path / "out")]
    assert main(task, options) == 2
    assert "of the type ConditionalGeneration: evaluate a causal model" in capsys.readouterr().err


def test_adapter_without_task_type_has_the_type_of_its_base(data, tokenizer, tmp_path):
    """An adapter of T5 that PEFT saved without task_type."""
    base = folder_of(random_t5(len(tokenizer), initializer_factor=3.0), tokenizer, tmp_path / "base")
    torch.manual_seed(1)
    lora = LoraConfig(r=2, target_modules=["q", "v"], init_lora_weights=False)
    model = get_peft_model(random_t5(len(tokenizer), initializer_factor=3.0), lora)
    model.save_pretrained(tmp_path / "adapter")
    folder_of(model.merge_and_unload(), tokenizer, tmp_path / "merged")
    given = {
        "unmerged": ["--model_name", str(base), "--adapter", str(tmp_path / "adapter")],
        "merged": ["--model_name", str(tmp_path / "merged")],
        "base": ["--model_name", str(base)],
    }
    found = {}
    for name, options in given.items():
        out = tmp_path / f"out-{name}"
        assert main("gsm8k", [*options, *data["gsm8k"], "--output_dir", str(out), "--max_new_tokens=8"]) == 0
        found[name] = json.loads((out / "predictions.jsonl").read_text())["completion"]
    assert found["unmerged"] == found["merged"] != found["base"]
