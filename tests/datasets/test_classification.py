"""The published data sets: a row of the hub's columns becomes exactly the published prompt and answer."""

import json

import pytest

from lora_one.data import load_dataset
from lora_one.data.encode import Encoder
from lora_one.datasets import DATASETS, labels_of
from lora_one.errors import UsageError
from tests.helpers.datasets import hub_of, named_dataset
from tests.helpers.paths import shared
from tests.helpers.runs import finish, small_run

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
    "emo": (
        {"text": "so sad", "label": 2},
        ("classify the emotion of the text: so sad\nresult: ", "sad", 2, ("so sad",)),
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


@pytest.mark.parametrize("name", [name for name in CLASSIFIED if name != "emo"])
def test_classification_rows(name, monkeypatch, tokenizer):
    row, expected = CLASSIFIED[name]
    held_out = "validation_matched" if name == "mnli" else "validation"
    asked = hub_of(monkeypatch, {"train": [row] * 3, held_out: [row]})
    splits = load_dataset(named_dataset(name), Encoder(tokenizer), 512)
    assert [split for _, _, split in asked] == ["train", held_out]
    assert len(splits.train_texts) == 3 and len(splits.validation_texts) == 1 and splits.counts["rows"] == 4
    for example in splits.train_texts + splits.validation_texts:
        assert (example.prompt, example.response, example.label, example.texts) == expected
    assert labels_of(name)[expected[2]] == expected[1]


def test_a_validation_size_is_held_out_of_train(monkeypatch, tokenizer):
    rows = [{"sentence": f"s{i}", "label": i % 2} for i in range(10)]
    asked = hub_of(monkeypatch, {"train": rows})
    splits = load_dataset(named_dataset("sst2", "dataset.validation_size=0.2"), Encoder(tokenizer), 128)
    assert [split for _, _, split in asked] == ["train"]
    assert [e.texts[0] for e in splits.train_texts] == [f"s{i}" for i in range(8)]
    assert [e.texts[0] for e in splits.validation_texts] == ["s8", "s9"]


def test_emo_holds_validation_out_of_train_and_leaves_the_test_split_alone(monkeypatch, tokenizer):
    row, expected = CLASSIFIED["emo"]
    asked = hub_of(monkeypatch, {"train": [row | {"text": f"{i}"} for i in range(9)] + [row]})
    splits = load_dataset(named_dataset("emo"), Encoder(tokenizer), 128)
    assert [split for _, _, split in asked] == ["train"] and len(splits.train_texts) == 9
    (last,) = splits.validation_texts
    assert (last.prompt, last.response, last.label, last.texts) == expected


# task, folder, training and validation rows, the first training label as it stands in the file
REAL = [
    ("cola", "CoLA", 8551, 1043, "acceptable"),
    ("sst2", "SST-2", 67349, 872, "negative"),
    ("mrpc", "MRPC", 3668, 408, "equivalent"),
    ("rte", "RTE", 2490, 277, "not_entailment"),
]


@pytest.mark.parametrize(("name", "folder", "train", "validation", "first"), REAL)
def test_glue_s_own_files(name, folder, train, validation, first):
    config = named_dataset(name, f"dataset.path={shared(f'data/glue/{folder}')}")
    examples, held_out = DATASETS[name].train(config), DATASETS[name].validation(config)
    assert (len(examples), len(held_out)) == (train, validation)
    assert examples[0].response == first == examples[0].gold
    assert {example.label for example in examples} == {0, 1} and all(all(example.texts) for example in examples)


def test_quotes_and_headless_rows_of_glue_s_own_files():
    cola = DATASETS["cola"].train(named_dataset("cola", f"dataset.path={shared('data/glue/CoLA')}"))
    assert cola[0].texts == ("Our friends won't buy this analysis, let alone the next one we propose.",)
    mrpc = DATASETS["mrpc"].train(named_dataset("mrpc", f"dataset.path={shared('data/glue/MRPC')}"))
    assert mrpc[0].texts[0].startswith('Amrozi accused his brother, whom he called "the witness", of')


def test_other_names_of_glue_s_own_files(tmp_path):
    header = "index\tpromptID\tsentence1\tsentence2\tlabel1\tgold_label\n"
    for name, text in (("train", "A"), ("dev_matched", "M"), ("dev_mismatched", "X")):
        (tmp_path / f"{name}.tsv").write_text(header + f'0\t1\t"{text}\tB\tneutral\tcontradiction\n')
    config = named_dataset("mnli", f"dataset.path={tmp_path}")
    (train,), (held_out,) = DATASETS["mnli"].train(config), DATASETS["mnli"].validation(config)
    assert (train.texts, held_out.texts, train.label) == (('"A', "B"), ('"M', "B"), 2)
    (tmp_path / "qqp.tsv").write_text("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\tA?\tB?\t1\n")
    (pair,) = DATASETS["qqp"].train(named_dataset("qqp", f"dataset.path={tmp_path / 'qqp.tsv'}"))
    assert (pair.texts, pair.response) == (("A?", "B?"), "duplicate")


def test_a_file_alone_has_no_validation_and_a_folder_needs_its_train_file(tokenizer):
    folder = shared("data/glue/QNLI")
    splits = load_dataset(
        named_dataset("qnli", f"dataset.path={folder / 'dev.tsv.gz'}", "dataset.max_train_samples=20"),
        Encoder(tokenizer),
        512,
    )
    assert splits.counts["rows"] == 5463 and splits.validation == []
    with pytest.raises(UsageError, match="has no file whose name begins with 'train'"):
        load_dataset(named_dataset("qnli", f"dataset.path={folder}"), Encoder(tokenizer), 512)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"sentence": "a", "label": 2}, "train row 1: the label '2' is not one of negative, positive"),
        ({"sentence": "a", "label": "good"}, "the label 'good' is not one of"),
        ({"text": "a", "label": 1}, "has no column sentence; its columns are text, label"),
    ],
)
def test_wrong_classification_rows(row, message, tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UsageError, match=message):
        DATASETS["sst2"].train(named_dataset("sst2", f"dataset.path={tmp_path}"))


@pytest.mark.parametrize(
    ("name", "path", "rows"), [("mrpc", "glue/MRPC", 3668 + 408), ("alpaca", "instruct/alpaca_en_demo.json", 999)]
)
def test_a_causal_model_trains_on_it(name, path, rows, tmp_path):
    run = small_run(
        tmp_path,
        "bundled/tiny",
        "model=tiny",
        f"dataset={name}",
        f"dataset.path={shared('data')}/{path}",
        "dataset.train_size=null",
        f"dataset.validation_size={'null' if name == 'mrpc' else 0.1}",
        "dataset.max_train_samples=16",
        "dataset.max_eval_samples=4",
        "model.max_length=512",
    )
    record = finish(run).read()
    assert record["data"]["rows"] == rows and record["data"]["validation"]["whole"] > 0
