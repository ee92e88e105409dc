"""The questions of evaluations, from the hub and from local files."""

import json

import pytest
from datasets import Dataset

from lora_one.datasets import sources
from lora_one.datasets.questions import EVALUATIONS, questions_of
from lora_one.errors import UsageError
from lora_one.evaluation import BENCHMARKS, humaneval, math
from tests.helpers.datasets import write_jsonl

QUESTION = "How many are left for Ann?"
PROGRAM = "def middle(numbers):\n"


def test_questions_of_evaluations_on_the_hub(monkeypatch):
    asked = []

    def from_hub(name, subset, split, first=None):
        asked.append((name, subset, split))
        return Dataset.from_list([{"question": QUESTION, "prompt": PROGRAM, "problem": f"{subset}"}])

    monkeypatch.setattr(sources, "from_hub", from_hub)
    assert set(EVALUATIONS) <= set(BENCHMARKS)
    assert list(questions_of("humaneval")) == [PROGRAM] and list(questions_of("gsm8k")) == [QUESTION]
    assert list(questions_of("math")) == list(math.SUBJECTS) and list(questions_of("mmlu")) == [QUESTION]
    assert asked[0] == (*humaneval.SOURCE, "test") and asked[2] == (math.HUB, math.SUBJECTS[0], "test")


def test_questions_of_local_folders(tmp_path):
    """MMLU's files without a header; the commonsense sets without their template and options."""
    for name, text in (
        (
            "boolq",
            "Please answer the following question with true or false, question: is it?\n\nAnswer format: true/false",
        ),
        ("hellaswag", "Please choose the correct ending to complete the given sentence: Roof: A man\n\nEnding1: sits"),
        ("own", "A question: with a colon"),
    ):
        (tmp_path / "sets" / name).mkdir(parents=True)
        (tmp_path / "sets" / name / "test.json").write_text(json.dumps([{"instruction": text, "answer": "true"}]))
    assert list(questions_of(str(tmp_path / "sets"))) == ["is it?", "Roof: A man", "A question: with a colon"]
    (tmp_path / "mmlu" / "test").mkdir(parents=True)
    (tmp_path / "mmlu" / "test" / "virology_test.csv").write_text('"One,\ntwo?",1,2,3,4,A\nThree?,1,2,3,4,B\n')
    assert list(questions_of(str(tmp_path / "mmlu"))) == ["One,\ntwo?", "Three?"]
    with pytest.raises(
        UsageError, match=r"has no column named question, problem, prompt, instruction: rename the column"
    ):
        list(questions_of(str(write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}]))))
