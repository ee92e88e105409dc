"""The questions of the commonsense sets as lm_eval's tasks ask them, and where solved examples come from."""

import json

import pytest

from lora_one.errors import UsageError
from lora_one.evaluation.commonsense_choices import TASKS, examples_of
from tests.helpers.commonsense import ROWS

ASKED = {
    "boolq": ("\nQuestion: is water wet?\nAnswer:", ["no", "yes"], 1),
    "piqa": ("Question: dresser\nAnswer:", ["bobby pin ", "wood  pin "], 1),
    "social_i_qa": ("Q: Jan met Lee. She said: hi. What next?\nA:", ["go", "stay", "ask Lee"], 2),
    "hellaswag": ("Ice fishing: A man sits. He waits. The old man", ["eats.", "looks up. Sings.", "is.", "ice"], 1),
    "ARC-Easy": ("Question: Which?\nRead.\nAnswer:", ["a", "b c", "d"], 1),
    "openbookqa": ("Fog is", ["wet", "dry"], 0),
}
"""Set -> text, options and index of the gold option of ROWS, as lm_eval 0.4.13 makes them."""
SOLVED = "Ann saw Bo, so Ann ran.\n\n"


@pytest.mark.parametrize("name", ASKED)
def test_the_options_continue_the_question(name):
    text, options, gold = ASKED[name]
    asked = TASKS[name](ROWS[name][2])
    assert list(asked.contexts) == [text] * len(options) and list(asked.continuations) == options
    assert (list(asked.options), asked.gold, asked.text) == (options, gold, text)
    assert asked.solved == f"{text} {options[gold]}\n\n"


def test_winogrande_is_the_other_way_round():
    """The rest of the sentence continues the sentence with each option."""
    asked = TASKS["winogrande"](ROWS["winogrande"][2])
    assert asked.contexts == ["Ann saw Bo, so Ann", "Ann saw Bo, so Bo"] and asked.continuations == ["ran."] * 2
    assert (asked.options, asked.gold, asked.solved) == (["Ann", "Bo"], 0, SOLVED)


def written(folder, split, names):
    """A file of winogrande's form in which the options of each row have their own names."""
    rows = []
    for name in names:
        instruction = ROWS["winogrande"][0].replace("Ann", name)
        rows.append({"instruction": instruction, "answer": "option1"})
    (folder / f"{split}.json").write_text(json.dumps(rows))


def test_solved_examples_are_rows_of_the_training_file(tmp_path):
    written(tmp_path, "test", ["Ed", "Flo"])
    written(tmp_path, "train", ["Cy", "Di", "Eve"])
    found = examples_of(tmp_path, "winogrande", 2)
    shots = SOLVED.replace("Ann", "Cy") + SOLVED.replace("Ann", "Di")
    assert [example.id for example in found] == ["winogrande/0", "winogrande/1"]
    assert [example.prompt for example in found] == [f"{shots}{name} saw Bo, so _ ran." for name in ("Ed", "Flo")]
    assert all(example.shots == shots and example.gold == "option1" for example in found)


def test_without_a_training_file_they_are_test_rows_that_are_not_scored(tmp_path):
    written(tmp_path, "test", ["Ed", "Flo", "Gus"])
    for place in (tmp_path, tmp_path / "test.json"):
        assert [example.id for example in examples_of(place, "winogrande", 0)] == [f"winogrande/{i}" for i in range(3)]
        (last,) = examples_of(place, "winogrande", 2)
        assert last.id == "winogrande/2"
        assert last.prompt == SOLVED.replace("Ann", "Ed") + SOLVED.replace("Ann", "Flo") + "Gus saw Bo, so _ ran."


@pytest.mark.parametrize(
    ("trained", "words"),
    [
        (True, "has 3 training rows: pass at most 3"),
        (False, "has 3 test rows and no training file, and one row must be left to score: pass at most 2"),
    ],
)
def test_more_solved_examples_than_there_are(trained, words, tmp_path):
    written(tmp_path, "test", ["Ed", "Flo", "Gus"])
    if trained:
        written(tmp_path, "train", ["Cy", "Di", "Eve"])
    examples_of(tmp_path, "winogrande", 3 if trained else 2)
    with pytest.raises(UsageError) as error:
        examples_of(tmp_path, "winogrande", 4 if trained else 3)
    assert str(error.value).startswith("--num_fewshot=") and words in str(error.value)


def test_words_belong_to_their_options(tmp_path):
    """Of boolq the first option is no, whose word is false."""
    (tmp_path / "test.json").write_text(json.dumps([{"instruction": ROWS["boolq"][0], "answer": "true"}]))
    (example,) = examples_of(tmp_path, "boolq", 0)
    assert example.words == ("false", "true") and example.choice.options == ["no", "yes"]
    assert example.words[example.choice.gold] == example.gold == "true"
