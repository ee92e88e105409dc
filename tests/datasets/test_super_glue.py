"""SuperGLUE's released files, train.jsonl, val.jsonl and test.jsonl of each set, in training and evaluation."""

import json

import pytest

from lora_one.data import load_dataset
from lora_one.data.encode import Encoder
from lora_one.datasets.sources import evaluation_data
from lora_one.errors import UsageError
from lora_one.evaluation import glue
from lora_one.evaluation.command import main
from tests.helpers.datasets import named_dataset, write_jsonl
from tests.helpers.models import folder_of, random_llama

# set: rows with the fields and the labels of the released files, then the words and the indices of their classes
RELEASED = {
    "boolq": (
        [
            {"question": "is ice cold", "passage": "Ice -- Ice is frozen water.", "idx": 0, "label": True},
            {"question": "is fire cold", "passage": "Fire -- Fire is hot.", "idx": 1, "label": False},
        ],
        [("true", 1), ("false", 0)],
    ),
    "cb": (
        [
            {"premise": "A: I think it rains.", "hypothesis": "it rains", "label": "neutral", "idx": 0},
            {"premise": "B: It rains.", "hypothesis": "it rains", "label": "entailment", "idx": 1},
            {"premise": "B: It is dry.", "hypothesis": "it rains", "label": "contradiction", "idx": 2},
        ],
        [("neutral", 2), ("entailment", 0), ("contradiction", 1)],
    ),
    "copa": (
        [
            {"premise": "It rained.", "choice1": "I got wet.", "choice2": "I slept.", "question": "effect", "label": 0}
            | {"idx": 0},
            {"premise": "I got wet.", "choice1": "I slept.", "choice2": "It rained.", "question": "cause", "label": 1}
            | {"idx": 1},
        ],
        [("choice 1", 0), ("choice 2", 1)],
    ),
    "rte": (
        [
            {"premise": "Dana Reeve has died.", "hypothesis": "Dana lives.", "label": "not_entailment", "idx": 0},
            {"premise": "Yet we now are seeing it.", "hypothesis": "It is seen.", "label": "entailment", "idx": 1},
        ],
        [("not_entailment", 1), ("entailment", 0)],
    ),
    "wic": (
        [
            {"word": "board", "sentence1": "Room and board.", "sentence2": "He nailed boards.", "idx": 0}
            | {"label": False, "start1": 9, "start2": 10, "end1": 14, "end2": 16, "version": 1.1},
            {"word": "circulate", "sentence1": "Air circulates.", "sentence2": "Rumours circulate.", "idx": 1}
            | {"label": True, "start1": 4, "start2": 8, "end1": 14, "end2": 17, "version": 1.1},
        ],
        [("false", 0), ("true", 1)],
    ),
}


def released(folder, rows):
    """The three files of a set; those of test have no labels, and train has the rows in reverse."""
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", rows[::-1])
    write_jsonl(folder / "val.jsonl", rows)
    write_jsonl(folder / "test.jsonl", [{name: row[name] for name in row if name != "label"} for row in rows])
    return folder


@pytest.mark.parametrize("name", RELEASED)
def test_released_folders_are_read(name, tokenizer, tmp_path):
    rows, classes = RELEASED[name]
    folder = released(tmp_path / name, rows)
    splits = load_dataset(named_dataset(name, f"dataset.path={folder}"), Encoder(tokenizer), 512)
    assert [(example.response, example.label) for example in splits.validation_texts] == classes
    assert [(example.response, example.label) for example in splits.train_texts] == classes[::-1]
    evaluated = glue.validation_rows(str(folder), name)
    assert [(example.gold, example.id) for example in evaluated] == [
        (word, f"{name}/{number}") for number, (word, _) in enumerate(classes)
    ]
    assert evaluated[0].texts == tuple(rows[0][column] for column in glue.SETS[name].columns)
    assert all(text in evaluated[0].prompt for text in evaluated[0].texts)
    assert evaluation_data(str(folder / "train.jsonl")) == str(folder)


@pytest.mark.parametrize("name", RELEASED)
def test_evaluation_reads_the_folder(name, tokenizer, tmp_path):
    rows, classes = RELEASED[name]
    folder = released(tmp_path / name, rows)
    base = folder_of(random_llama(len(tokenizer)), tokenizer, tmp_path / "base")
    options = ["--dataset", name, "--model_name", str(base), "--data_path", str(folder), "--max_new_tokens=2"]
    assert main("glue", [*options, "--output_dir", str(tmp_path / "out")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
    assert [line["gold"] for line in lines] == [word for word, _ in classes]


def test_other_files_that_begin_with_val_are_no_split(tmp_path):
    rows, _ = RELEASED["cb"]
    write_jsonl(tmp_path / "values.jsonl", rows)
    with pytest.raises(UsageError, match=r"has no file whose name begins with 'validation'.*it contains values.jsonl"):
        glue.validation_rows(str(tmp_path), "cb")
    assert evaluation_data(str(tmp_path)) is None
    write_jsonl(tmp_path / "val.jsonl", rows[:1])
    assert len(glue.validation_rows(str(tmp_path), "cb")) == 1
    write_jsonl(tmp_path / "validation.jsonl", rows)
    with pytest.raises(UsageError, match=r"several files for 'validation' \(val.jsonl, validation.jsonl\)"):
        glue.validation_rows(str(tmp_path), "cb")


def test_the_file_of_test_has_no_labels(tmp_path):
    folder = released(tmp_path / "cb", RELEASED["cb"][0])
    with pytest.raises(UsageError, match="has no column label"):
        glue.validation_rows(str(folder / "test.jsonl"), "cb")
