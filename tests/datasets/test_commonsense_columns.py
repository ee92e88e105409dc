"""The columns of the original sets, rebuilt from rows in the form of LLM-Adapters."""

import json

import pytest

from lora_one.datasets.commonsense_columns import columns_of, read_columns
from lora_one.errors import RunError
from tests.helpers.paths import shared

ROWS = {
    "boolq": (
        "Please answer the following question with true or false, question: is water wet?\n\nAnswer format: true/false",
        "true",
        {"passage": "", "question": "is water wet", "label": 1},
    ),
    "piqa": (
        "Please choose the correct solution to the question: dresser\n\nSolution1: bobby pin \n\n"
        "Solution2: wood  pin \n\nAnswer format: solution1/solution2",
        "solution2",
        {"goal": "dresser", "sol1": "bobby pin ", "sol2": "wood  pin ", "label": 1},
    ),
    "social_i_qa": (
        "Please choose the correct answer to the question: Jan met Lee. She said: hi. What next?\n\n"
        "Answer1: go Answer2: stay Answer3: ask Lee\n\nAnswer format: answer1/answer2/answer3",
        "answer3",
        {
            "context": "Jan met Lee. She said: hi.",
            "question": "What next?",
            "answerA": "go",
            "answerB": "stay",
            "answerC": "ask Lee",
            "label": "3",
        },
    ),
    "hellaswag": (
        "Please choose the correct ending to complete the given sentence: Ice fishing: A man sits. He waits. "
        "the old man\n\nEnding1: eats. Ending2: looks up. Sings. Ending3: is. Ending4: ice\n\n"
        "Answer format: ending1/ending2/ending3/ending4",
        "ending2",
        {
            "activity_label": "Ice fishing",
            "ctx_a": "A man sits. He waits.",
            "ctx_b": "the old man",
            "endings": ["eats.", "looks up. Sings.", "is.", "ice"],
            "label": "1",
        },
    ),
    "winogrande": (
        "Please choose the correct answer to fill in the blank to complete the given sentence: Ann saw Bo, so _ "
        "ran.\n\nOption1: Ann Option2: Bo Answer format: option1/option2",
        "option1",
        {"sentence": "Ann saw Bo, so _ ran.", "option1": "Ann", "option2": "Bo", "answer": "1"},
    ),
    "ARC-Easy": (
        "Please choose the correct answer to the question: Which?\nRead.\n\nAnswer1: a Answer2: b c Answer3: d\n\n"
        "Answer format: answer1/answer2/answer3",
        "answer2",
        {
            "question": "Which?\nRead.",
            "choices": {"text": ["a", "b c", "d"], "label": ["A", "B", "C"]},
            "answerKey": "B",
        },
    ),
    "openbookqa": (
        "Please choose the correct answer to the question: Fog is\n\nAnswer1: wet Answer2: dry\n\n"
        "Answer format: answer1/answer2",
        "answer1",
        {"question_stem": "Fog is", "choices": {"text": ["wet", "dry"], "label": ["A", "B"]}, "answerKey": "A"},
    ),
}
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
