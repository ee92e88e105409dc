"""The published data sets: a row of the hub's columns becomes exactly the published prompt and answer."""

import json

import pytest
from conftest import finish, run_config, shared, small_run
from datasets import Dataset

from lora_one.config.schemas import DATASETS
from lora_one.data import SOURCES, labels_of, load_dataset, sources
from lora_one.errors import UsageError

# data set: one row as the hub has it, then the prompt, the response, the class and the texts of that row
CLASSIFIED = {
    "sst2": (
        {"sentence": "a joy .", "label": 1, "idx": 0},
        ("classify the sentiment of the text: a joy .\nresult: ", "positive", 1, ("a joy .",)),
    ),
    "cola": (
        {"sentence": "Them left.", "label": 0, "idx": 0},
        ("classify the grammaticality of the text: Them left.\nresult: ", "unacceptable", 0, ("Them left.",)),
    ),
    "qqp": (
        {"question1": "Why?", "question2": "How so?", "label": 1, "idx": 0},
        ("classify the semantic similarity of the text: Why?\nHow so?\nresult: ", "duplicate", 1, ("Why?", "How so?")),
    ),
    "mrpc": (
        {"sentence1": "A", "sentence2": "B", "label": 1, "idx": 0},
        ("classify the semantic similarity of the text: A\nB\nresult: ", "equivalent", 1, ("A", "B")),
    ),
    "mnli": (
        {"premise": "A", "hypothesis": "B", "label": 2, "idx": 0},
        ("classify the semantic similarity of the text: A\nB\nresult: ", "contradiction", 2, ("A", "B")),
    ),
    "qnli": (
        {"question": "A?", "sentence": "B", "label": 1, "idx": 0},
        (
            "classify the semantic similarity of the question and the sentence: A?\nB\nresult: ",
            "not_entailment",
            1,
            ("A?", "B"),
        ),
    ),
    "boolq": (
        {"question": "is it", "passage": "It is.", "idx": 0, "label": 1},
        (
            "determine if the statement is true or false based on the passage: It is.\nQuestion: is it\nresult: ",
            "true",
            1,
            ("It is.", "is it"),
        ),
    ),
    "cb": (
        {"premise": "A", "hypothesis": "B", "idx": 0, "label": 1},
        (
            "classify the relationship between the premise and hypothesis: \npremise: A\nhypothesis: B\nresult: ",
            "contradiction",
            1,
            ("A", "B"),
        ),
    ),
    "copa": (
        {"premise": "A", "choice1": "B", "choice2": "C", "question": "effect", "idx": 0, "label": 0},
        (
            "choose the correct effect: \npremise: A\nchoice 1: B\nchoice 2: C\nresult: ",
            "choice 1",
            0,
            ("effect", "A", "B", "C"),
        ),
    ),
    "rte": (
        {"premise": "A", "hypothesis": "B", "idx": 0, "label": 0},
        (
            "determine if the hypothesis is entailed by the premise: \npremise: A\nhypothesis: B\nresult: ",
            "entailment",
            0,
            ("A", "B"),
        ),
    ),
    "wic": (
        {"word": "bed", "sentence1": "A", "sentence2": "B", "start1": 1, "idx": 0, "label": 0},
        (
            "determine if the word has the same meaning in both sentences: \nword: bed\nsentence1: A\nsentence2: B\n"
            "result: ",
            "false",
            0,
            ("bed", "A", "B"),
        ),
    ),
}


def dataset(name, *overrides):
    return run_config("model=tiny", f"dataset={name}", *overrides).dataset


def hub_of(monkeypatch, rows):
    """The hub holds these rows, by split; which split was asked for is noted."""
    asked = []

    def from_hub(name, subset, split, first=None):
        asked.append((name, subset, split))
        return Dataset.from_list(rows[split][:first])

    monkeypatch.setattr(sources, "from_hub", from_hub)
    return asked


@pytest.mark.parametrize("name", CLASSIFIED)
def test_classification_rows(name, monkeypatch, tokenizer):
    row, expected = CLASSIFIED[name]
    held_out = "validation_matched" if name == "mnli" else "validation"
    asked = hub_of(monkeypatch, {"train": [row] * 3, held_out: [row]})
    splits = load_dataset(dataset(name), tokenizer, 512)
    assert [split for _, _, split in asked] == ["train", held_out]
    assert len(splits.train_texts) == 3 and len(splits.validation_texts) == 1 and splits.counts["rows"] == 4
    for example in splits.train_texts + splits.validation_texts:
        assert (example.prompt, example.response, example.label, example.texts) == expected
    assert labels_of(name)[expected[2]] == expected[1]


def test_a_validation_size_is_held_out_of_train(monkeypatch, tokenizer):
    rows = [{"sentence": f"s{i}", "label": i % 2} for i in range(10)]
    asked = hub_of(monkeypatch, {"train": rows})
    splits = load_dataset(dataset("sst2", "dataset.validation_size=0.2"), tokenizer, 128)
    assert [split for _, _, split in asked] == ["train"]
    assert [e.texts[0] for e in splits.train_texts] == [f"s{i}" for i in range(8)]
    assert [e.texts[0] for e in splits.validation_texts] == ["s8", "s9"]


def test_every_data_set_has_its_source():
    assert set(SOURCES) == set(DATASETS) and labels_of("gsm8k") is None


def test_classification_waits_for_its_model_type():
    with pytest.raises(UsageError, match=r"model\.type=ConditionalGeneration is not a choice; .*CausalLM"):
        run_config("dataset=mrpc")


# task, folder, training and validation rows, the first training label as it stands in the file
REAL = [
    ("cola", "CoLA", 8551, 1043, "acceptable"),
    ("sst2", "SST-2", 67349, 872, "negative"),
    ("mrpc", "MRPC", 3668, 408, "equivalent"),
    ("rte", "RTE", 2490, 277, "not_entailment"),
]


@pytest.mark.parametrize(("name", "folder", "train", "validation", "first"), REAL)
def test_glue_s_own_files(name, folder, train, validation, first):
    config = dataset(name, f"dataset.path={shared(f'data/glue/{folder}')}")
    examples, held_out = SOURCES[name].train(config), SOURCES[name].validation(config)
    assert (len(examples), len(held_out)) == (train, validation)
    assert examples[0].response == first == examples[0].gold
    assert {example.label for example in examples} == {0, 1} and all(all(example.texts) for example in examples)


def test_quotes_and_headless_rows_of_glue_s_own_files():
    cola = SOURCES["cola"].train(dataset("cola", f"dataset.path={shared('data/glue/CoLA')}"))
    assert cola[0].texts == ("Our friends won't buy this analysis, let alone the next one we propose.",)
    mrpc = SOURCES["mrpc"].train(dataset("mrpc", f"dataset.path={shared('data/glue/MRPC')}"))
    assert mrpc[0].texts[0].startswith('Amrozi accused his brother, whom he called "the witness", of')


def test_a_file_alone_has_no_validation_and_a_folder_needs_its_train_file(tokenizer):
    folder = shared("data/glue/QNLI")
    splits = load_dataset(
        dataset("qnli", f"dataset.path={folder / 'dev.tsv.gz'}", "dataset.max_train_samples=20"), tokenizer, 512
    )
    assert splits.counts["rows"] == 5463 and splits.validation == []
    with pytest.raises(UsageError, match="holds no file that begins with 'train'"):
        load_dataset(dataset("qnli", f"dataset.path={folder}"), tokenizer, 512)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"sentence": "a", "label": 2}, "train row 1: the label '2' is none of negative, positive"),
        ({"sentence": "a", "label": "good"}, "the label 'good' is none of"),
        ({"text": "a", "label": 1}, "has no column sentence; it has text, label"),
    ],
)
def test_wrong_classification_rows(row, message, tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UsageError, match=message):
        SOURCES["sst2"].train(dataset("sst2", f"dataset.path={tmp_path}"))


def test_a_causal_model_learns_mrpc(tmp_path):
    data = shared("data/glue/MRPC")
    limits = ("dataset.max_train_samples=16", "dataset.max_eval_samples=4", "dataset.accuracy_examples=0")
    run = small_run(
        tmp_path,
        "bundled/tiny",
        "model=tiny",
        "dataset=mrpc",
        f"dataset.path={data}",
        "dataset.train_size=null",
        "dataset.validation_size=null",
        "model.max_length=512",
        *limits,
    )
    record = finish(run).read()
    assert record["data"]["rows"] == 3668 + 408
