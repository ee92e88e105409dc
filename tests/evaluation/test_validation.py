"""Validation on one process; tests/training/test_trainer_on_processes.py has it on two."""

import pytest
import torch

from lora_one.data import Splits
from lora_one.data.encode import batches_of
from lora_one.datasets import CLASSIFIED, labels_of
from lora_one.datasets.own import own_rows
from lora_one.errors import RunError, UsageError
from lora_one.evaluation import batches, validation
from lora_one.evaluation.decoding import Completion
from lora_one.losses import mean_loss
from lora_one.types import Example
from tests.helpers.datasets import write_jsonl
from tests.helpers.examples import examples
from tests.helpers.models import random_llama, random_roberta, random_t5
from tests.helpers.runs import run_config
from tests.helpers.validation import ENCODER, apart, counting, heads, validation_of

KINDS = {
    "CausalLM": (random_llama, examples),
    "ConditionalGeneration": (random_t5, apart),
    "SequenceClassification": (random_roberta, heads),
}


@pytest.mark.parametrize("reduction", ["token", "example"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_that_of_one_example_at_a_time_in_fewer_passes(kind, reduction):
    build, make = KINDS[kind]
    model, data = build(), make(12)
    expected = mean_loss(model, batches_of(data, 1, 1), reduction)
    shapes = counting(model)
    found = validation_of(data, f"model.loss={reduction}")(model)
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert len(shapes) == 1 and shapes[0][0] == 12


def test_accuracy_of_a_head():
    model, data = random_roberta(), heads(12)
    with torch.no_grad():
        right = [model(torch.tensor([e.input_ids])).logits.argmax().item() == e.labels for e in data]
    found = validation_of(data)(model)
    assert found["eval_accuracy"] == pytest.approx(sum(right) / 12) and 0 < sum(right) < 12


@pytest.mark.parametrize("name", sorted(CLASSIFIED))
def test_generated_answers_of_every_classification_set_are_scored_by_the_words_of_its_classes(name, monkeypatch):
    words = labels_of(name)
    texts = [Example("Which class?", words[0], gold=words[0])] * 4
    written = [f" {words[0]}\n", words[1], "neither", words[0]]
    monkeypatch.setattr(validation, "complete", lambda *_: enumerate(map(Completion, written)))
    run = run_config("init=default", f"dataset={name}", "model=tiny", "dataset.accuracy_examples=4")
    found = validation.Validation(run, Splits([], [], [], texts, {}), ENCODER)(model=None)
    assert (found["eval_accuracy"], found["eval_parsed"]) == (0.5, 0.75)


ROWS = [
    ("after ####", "", Example("Q", "2 + 2\n#### 4", "4"), {"so #### 4": True, "4": False}),
    ("a column of numbers", "answer", Example("Q", "The answer is: 4", "4"), {"The answer is 4.0": True, "4": False}),
    ("a column of texts", "answer", Example("Q", "Paris ", "Paris"), {" Paris\n": True, "paris": False}),
]


@pytest.mark.parametrize(("column", "example", "written"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_own_data_is_scored_in_the_form_of_its_responses(column, example, written, tmp_path, monkeypatch):
    line = {"prompt": example.prompt, "response": example.response, "answer": example.gold}
    path = write_jsonl(tmp_path / "own.jsonl", [line] * len(written))
    changes = ("dataset=json", "model=tiny", f"dataset.path={path}", "dataset.accuracy_examples=9")
    run = run_config("init=default", *changes, *([f"dataset.answer={column}"] if column else []))
    texts = list(own_rows(run.dataset))
    assert texts[0] == example
    monkeypatch.setattr(validation, "complete", lambda *_: enumerate(map(Completion, written)))
    found = validation.Validation(run, Splits([], [], [], texts, {}), ENCODER)(model=None)
    assert found["eval_accuracy"] == sum(written.values()) / len(written)


@pytest.mark.parametrize("example", [Example("Q", "4"), Example("Q", "It is 4.", "4"), Example("Q", "#### 5", "4")])
def test_an_accuracy_that_cannot_be_measured_is_refused(example, tmp_path):
    path = write_jsonl(tmp_path / "own.jsonl", [{"prompt": "Q", "response": "4"}])
    changes = ("dataset=json", "model=tiny", f"dataset.path={path}")
    splits = Splits([], [], [], [example] * 3, {})
    with pytest.raises(UsageError, match=r"none of the 3 validation examples can be scored.*set dataset.answer="):
        validation.Validation(run_config("init=default", *changes, "dataset.accuracy_examples=2"), splits, ENCODER)
    assert not validation.Validation(run_config("init=default", *changes), splits, ENCODER).asked


def test_the_refusal_shows_a_response_and_a_gold_answer_that_differ(tmp_path):
    path = write_jsonl(tmp_path / "own.jsonl", [{"prompt": "Q", "response": "4", "gold": "4"}])
    run = run_config("init=default", "dataset=json", "model=tiny", f"dataset.path={path}", "dataset.answer=gold")
    said = str(validation.nothing_scorable(run, [Example("Q", "perhaps twelve", "12")]))
    assert "(not so: 'perhaps twelve' and '12')" in said and "dataset.answer=<column" not in said


def test_batches_contain_examples_of_similar_length(monkeypatch):
    monkeypatch.setitem(batches.TOKENS, "cpu", 100)
    model, data = random_llama(), examples(12)
    shapes = counting(model)
    validation_of(data)(model)
    assert sum(rows for rows, _ in shapes) == 12
    assert all(rows * length <= 100 for rows, length in shapes)
    assert [length for _, length in shapes] == sorted((length for _, length in shapes), reverse=True)
    assert sum(rows * length for rows, length in shapes) < 1.2 * sum(len(e.input_ids) for e in data)


def test_large_vocabularies_get_small_batches():
    model = random_llama()
    assert batches.automatic_tokens(model, 512) == 2048
    assert batches.automatic_tokens(model, 262_144) == 512  # 512 MiB of logits in fp32


def test_out_of_memory_halves_batches_and_counts_each_example_once():
    model, data = random_llama(), examples(12)
    expected = mean_loss(model, batches_of(data, 1, 1), "example")
    shapes = counting(model, most=120)
    found = validation_of(data, "model.loss=example")(model)
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-6)
    held = [rows for rows, length in shapes if rows * length <= 120]
    assert sum(held) == 12 and len(shapes) - len(held) == 3  # of 12, 6 and 3 rows of 42 tokens


def test_one_example_beyond_memory_is_an_error():
    model = random_llama()
    counting(model, most=20)
    with pytest.raises(RunError, match=r"a single example of 24 tokens does not fit.* lower model.max_length"):
        validation_of(examples(6))(model)
