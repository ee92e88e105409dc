"""Saved completions scored again: by their own benchmark alone, and only where a line is whole."""

import json

import pytest

from lora_one.evaluation.command import main

TEST = "def check(f):\n    assert f() == 1\n"
PROBLEM = {"task_id": "t", "prompt": "def f():\n    'One.'\n", "entry_point": "f", "test": TEST}
# benchmark -> id, completion and gold of a line of its own
OWN = {
    "commonsense": ("piqa/0", "the correct answer is solution1", "solution1"),
    "glue": ("sst2/0", "positive", "positive"),
    "gsm8k": (0, "#### 3", "3"),
    "humaneval": (0, "def f():\n    return 1", PROBLEM),
    "math": (0, r"so \boxed{3}", {"answer": "3"}),
    "mmlu": ("virology/0", " A", "A"),
}
OPTIONS = {"humaneval": ["--unsafe"]}  # as everywhere, whatever this kernel lets be isolated


def written(folder, *lines):
    file = folder / "predictions.jsonl"
    names = ("id", "prompt", "completion", "gold")
    file.write_text("".join(json.dumps(dict(zip(names, line, strict=True))) + "\n" for line in lines))
    return file


@pytest.mark.parametrize("task", OWN)
def test_rejects_predictions_of_another_benchmark(task, tmp_path, capsys):
    if task == "math":
        pytest.importorskip("math_verify", reason="MATH needs math-verify: pip install -e .[math]")
    for name, (number, completion, gold) in OWN.items():
        # a completion in which nothing is found must not hide what the gold answer is
        for text in (completion, "nothing"):
            if task == name == "mmlu" and text == "nothing":
                continue
            place = tmp_path / f"{name}-{text == completion}"
            place.mkdir()
            command = [f"--rescore={written(place, (number, 'p', text, gold))}", *OPTIONS.get(task, ())]
            if name == task:
                assert main(task, command) == 0
                counts = json.loads((place / "rescored/metrics.json").read_text())["counts"]
                assert counts["correct"] == (text == completion)
            else:
                assert main(task, command) == 2
                assert "line 1 is not a prediction" in capsys.readouterr().err


@pytest.mark.parametrize("task", OWN)
@pytest.mark.parametrize("change", [{"completion": None}, {"prompt": None}, {"id": ["x"]}, {"id": None}], ids=str)
def test_rejects_incomplete_prediction_lines(task, change, tmp_path, capsys):
    if task == "math":
        pytest.importorskip("math_verify", reason="MATH needs math-verify: pip install -e .[math]")
    number, completion, gold = OWN[task]
    line = {"id": number, "prompt": "p", "completion": completion, "gold": gold} | change
    file = written(tmp_path, tuple(line.values()))
    assert main(task, [f"--rescore={file}", *OPTIONS.get(task, ())]) == 2
    assert "line 1 is not a prediction" in capsys.readouterr().err


def test_glue_lines_of_two_sets_have_no_common_score(tmp_path, capsys):
    file = written(tmp_path, ("sst2/0", "p", "positive", "positive"), ("cola/0", "p", "acceptable", "acceptable"))
    assert main("glue", [f"--rescore={file}"]) == 2
    assert "several sets (cola, sst2)" in capsys.readouterr().err


def test_glue_needs_the_name_of_a_set_only_where_it_reads_one(tmp_path, capsys):
    assert main("glue", ["--model_name=m"]) == 2
    assert "pass --dataset=<name>" in capsys.readouterr().err
