"""The published data sets: a row of the hub's columns becomes exactly the published prompt and answer."""

import doctest

import pytest

from lora_one.datasets import DATASETS, codefeedback, commonsense, labels_of
from tests.helpers.datasets import ALPACA, hub_of, named_dataset
from tests.helpers.paths import ROOT

WITH_INPUT = "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
CODE = "Try\n```py\nx\n```"
ASKED = "answer the question: Who?\ncontext: Ann and Bo.\nresult: "

# data set, rows as the hub has them, the examples they become
WRITTEN = [
    (
        "alpaca",
        [{"instruction": "Add.", "input": "", "output": "3"}, {"instruction": "Add.", "input": "1 2", "output": "3"}],
        [(ALPACA, "3"), (WITH_INPUT, "3")],
    ),
    ("alpaca_gpt4", [{"instruction": "Add.", "input": "1 2", "output": "3", "text": ""}], [(WITH_INPUT, "3")]),
    (
        "codefeedback",
        [
            {"query": "Add.", "answer": CODE + " or\n```py\ny\n```", "lang": "py"},
            {"query": "Add.", "answer": "No code."},
            {"query": "Add.", "answer": "Cut ```x"},
        ],
        [(ALPACA, CODE), (ALPACA, "Cut ```x```")],
    ),
    (
        "wizard_lm",
        [
            {"instruction": "Add.", "output": "3"},
            {"instruction": "Add.", "output": "I'm Sorry."},
            {"instruction": "Add.", "output": "As an AI, I add."},
        ],
        [(ALPACA, "3")],
    ),
    ("flan", [{"inputs": "Add.", "targets": "3", "task": "t"}], [(ALPACA, "3")]),
    ("flan_v2", [{"inputs": "Add {1}.", "targets": "3", "task": "t"}], [("Add {1}.", "3")]),
    (
        "squad",
        [{"question": "Who?", "context": "Ann and Bo.", "answers": {"text": ["Ann", "Bo"], "answer_start": [0, 8]}}],
        [(ASKED, "Ann, Bo")],
    ),
    (
        "meta_math_full",
        [
            {"type": "MATH_AnsAug", "query": "1+2?", "response": "It is $3$.\nThe answer is: 3"},
            {"type": "GSM_Rephrased", "query": "1+2?", "response": "So\n#### 3\nThe answer is: 3"},
        ],
        [("Q: 1+2?\nA: ", "It is $3$."), ("Q: 1+2?\nA: ", "So\n#### 3")],
    ),
]


@pytest.mark.parametrize(("name", "rows", "expected"), WRITTEN, ids=[name for name, *_ in WRITTEN])
def test_written_answers(name, rows, expected, monkeypatch):
    hub_of(monkeypatch, {"train": rows, "validation": rows})
    source, config = DATASETS[name], named_dataset(name)
    assert [(example.prompt, example.response) for example in source.train(config)] == expected
    assert (source.validation is not None) == (name == "squad") and source.labels is None
    if source.validation:
        assert [(example.prompt, example.response) for example in source.validation(config)] == expected


def test_doctests():
    assert all(doctest.testmod(module).failed == 0 for module in (codefeedback, commonsense))


def test_every_data_set_has_its_configuration():
    files = {path.stem for path in (ROOT / "conf/dataset").glob("*.yaml") if not path.stem.startswith("_")}
    assert files == set(DATASETS) and labels_of("gsm8k") is None
