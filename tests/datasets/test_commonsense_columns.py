"""The columns of the original sets, rebuilt from rows in the form of LLM-Adapters."""

import json

import pytest

from lora_one.datasets.commonsense_columns import columns_of, read_columns
from lora_one.errors import RunError
from tests.helpers.commonsense import ROWS
from tests.helpers.paths import shared

EASY = ROWS["ARC-Easy"][0]


@pytest.mark.parametrize("name", ROWS)
def test_columns_of_a_row(name):
    instruction, answer, expected = ROWS[name]
    assert columns_of(name, instruction, answer) == expected


def test_a_whole_context_of_hellaswag_has_no_second_part():
    instruction = ROWS["hellaswag"][0].replace(" the old man", ' He says: "go."')
    columns = columns_of("hellaswag", instruction, "ending1")
    assert (columns["ctx_a"], columns["ctx_b"]) == ('A man sits. He waits. He says: "go."', "")


def instruction_of(name, row):
    """The form of LLM-Adapters, written again from the columns."""
    if name == "boolq":
        asked = f"answer the following question with true or false, question: {row['question']}?\n\n"
        return f"Please {asked}Answer format: true/false"
    if name == "piqa":
        options = f"Solution1: {row['sol1']}\n\nSolution2: {row['sol2']}\n\nAnswer format: solution1/solution2"
        return f"Please choose the correct solution to the question: {row['goal']}\n\n{options}"
    if name == "winogrande":
        options = f"Option1: {row['option1']} Option2: {row['option2']} Answer format: option1/option2"
        blank = "Please choose the correct answer to fill in the blank to complete the given sentence: "
        return f"{blank}{row['sentence']}\n\n{options}"
    if name == "hellaswag":
        context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b']}".removesuffix(" ")
        opening, word, texts = "ending to complete the given sentence: " + context, "ending", row["endings"]
    elif name == "social_i_qa":
        text = f"{row['context']} {row['question']}"
        opening, word, texts = f"answer to the question: {text}", "answer", [row[f"answer{label}"] for label in "ABC"]
    else:
        text = row.get("question", row.get("question_stem"))
        opening, word, texts = f"answer to the question: {text}", "answer", row["choices"]["text"]
    options = " ".join(f"{word.capitalize()}{number}: {text}" for number, text in enumerate(texts, start=1))
    words = "/".join(f"{word}{number}" for number in range(1, len(texts) + 1))
    return f"Please choose the correct {opening}\n\n{options}\n\nAnswer format: {words}"


def gold_of(name, row):
    if name in ("ARC-Easy", "ARC-Challenge", "openbookqa"):
        return f"answer{row['choices']['label'].index(row['answerKey']) + 1}"
    if name == "boolq":
        return ("false", "true")[row["label"]]
    word = {"piqa": "solution", "social_i_qa": "answer", "hellaswag": "ending", "winogrande": "option"}[name]
    number = row["answer"] if name == "winogrande" else row["label"]
    return f"{word}{int(number) + (name in ('piqa', 'hellaswag'))}"


@pytest.mark.parametrize("name", [*ROWS, "ARC-Challenge"])
def test_no_text_of_the_real_rows_is_lost(name):
    """Whole files: the form that is written again from the columns is the row, and so is its answer."""
    from lora_one.datasets.sources import read_rows

    folder = shared("data/commonsense") / name
    for split in ("test", "train"):
        if not any(folder.glob(f"{split}*")):
            continue
        rows = read_rows(None, str(folder), split, ["instruction", "answer"])
        for row, (columns, word) in zip(rows, read_columns(folder, name, split), strict=True):
            assert instruction_of(name, columns) == row["instruction"]
            assert gold_of(name, columns) == row["answer"] == word


def test_most_contexts_of_hellaswag_s_first_third_have_a_second_part():
    """The first 3,243 rows describe videos; their last sentence is incomplete, except in two rows. Others have none."""
    rows = [row for row, _ in read_columns(shared("data/commonsense/hellaswag"), "hellaswag", "test")]
    assert [number for number in range(3243) if not rows[number]["ctx_b"]] == [1673, 2346]
    assert not any(row["ctx_b"] for row in rows[3243:])


@pytest.mark.parametrize(
    ("instruction", "answer", "words"),
    [
        ("Is it?", "answer1", "row 2 (test): 'Is it?'... is not 'Please choose the correct answer to the question: "),
        (EASY, "answer4", "the answer 'answer4' is not one of answer1, answer2, answer3"),
        (
            ROWS["ARC-Easy"][0].replace("Answer2:", "Answer 2:"),
            "answer1",
            "does not contain the options answer1, answer2",
        ),
        (
            ROWS["ARC-Easy"][0].replace("answer1/", "answer0/"),
            "answer2",
            "does not begin with the words answer1, answer2",
        ),
    ],
)
def test_another_form_is_named(instruction, answer, words, tmp_path):
    rows = [{"instruction": EASY, "answer": "answer1"}, {"instruction": instruction, "answer": answer}]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    with pytest.raises(RunError) as error:
        read_columns(tmp_path, "ARC-Easy", "test")
    assert words in str(error.value) and str(error.value).endswith(": pass the file of LLM-Adapters for ARC-Easy")
