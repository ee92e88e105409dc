"""Rows that hold an evaluation's questions go, others stay, and the numbers are told."""

import doctest
import gzip
import json

import pytest

from lora_one.data import contamination, load_dataset
from lora_one.data.contamination import FORMAT, Questions, Search
from lora_one.data.encode import Encoder
from lora_one.datasets import DATASETS
from lora_one.datasets.questions import questions_of
from lora_one.errors import UsageError
from lora_one.records.provenance import config_hash, local_fingerprints
from lora_one.types import Example
from tests.helpers.paths import SHARED, shared
from tests.helpers.runs import run_config

QUESTION = "Ann has 3 red apples and 4 green ones. Bo takes half of them home. How many are left for Ann?"
PROGRAM = '''def middle(numbers: List[int]) -> int:
    """ Give the number that stands in the middle of a list once it
    is sorted, or the lower of two.
    >>> middle([3, 1, 2])
    2
    """
'''


def without_questions(examples, decontaminate):
    """Return the examples without a question, and the number removed for each evaluation."""
    search = Search(decontaminate)
    clean = list(search.clean(examples))
    search.report()
    return clean, search.removed


def config(name, path, *evaluations, **others):
    asked = [f"dataset.decontaminate=[{','.join(map(str, evaluations))}]"] if evaluations else []
    asked += [f"dataset.{key}={value}" for key, value in others.items()]
    return run_config("model=tiny", f"dataset={name}", f"dataset.path={path}", *asked).dataset


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("text", "held"),
    [
        (QUESTION, True),
        (f"Please solve: {QUESTION.upper()}\nThanks!", True),
        (QUESTION.replace(" ", "\n  ").replace(".", " \u2013"), True),
        (QUESTION.replace("3", "30"), True),  # a number changed, 13 words after it
        ("Bo takes half of them home. How many are left for Ann?", False),  # twelve
        ("And 4 green ones. Bo takes half of them home. How many are left?", True),
        (" ".join(reversed(QUESTION.split())), False),
        ("", False),
    ],
)
def test_thirteen_consecutive_words_identify_a_question(text, held):
    assert Questions([QUESTION]).occur_in(text) is held


def test_short_question_must_match_whole_and_shorter_ones_are_ignored():
    eight, seven = "Why does the sky look blue at noon?", "What is the capital city of France?"
    questions = Questions([eight, seven])
    assert (questions.count, questions.short) == (2, 1)
    assert questions.occur_in(f"Tell me: {eight.lower()}") and not questions.occur_in(eight.replace("noon", "night"))
    assert not questions.occur_in(seven)


def test_words_shared_by_many_questions_are_ignored():
    opening = "Read what follows with care and then choose the best one of these four options, please:"
    many = [f"{opening} number {i}" for i in range(FORMAT + 1)]
    assert not Questions(many).occur_in(opening) and Questions(many[:-1]).occur_in(opening)
    assert Questions([*many, QUESTION]).occur_in(QUESTION)


def test_docstring_alone_identifies_a_program():
    questions = Questions([PROGRAM])
    assert questions.occur_in(
        "Write a function to give the number that stands in the middle of a list once it is sorted"
    )
    assert questions.occur_in(f"Complete this:\n```python\n{PROGRAM}```")
    assert not questions.occur_in(
        "def middle(numbers: List[int]) -> int:\n    return sorted(numbers)[len(numbers) // 2]"
    )


def test_rows_are_removed_in_order_and_counted_once(capsys, tmp_path):
    one = write(tmp_path / "one.jsonl", [{"question": QUESTION}])
    two = write(tmp_path / "two.jsonl", [{"prompt": PROGRAM}, {"prompt": QUESTION}])
    examples = [Example(text, answer) for text, answer in ((QUESTION, "5"), ("a", PROGRAM), ("b", "c"), ("d", "e"))]
    clean, dropped = without_questions(examples, [str(one), str(two), str(one)])
    assert clean == examples[2:] and dropped == {str(one): 1, str(two): 1}
    out = capsys.readouterr().out.splitlines()
    assert out == [
        f"data: 1 of 4 training rows contain one of the 1 questions of {one} and were removed",
        f"data: 1 of 3 training rows contain one of the 2 questions of {two} and were removed",
    ]
    assert without_questions(examples, None) == (examples, {})


def test_contaminated_rows_are_counted_separately_from_long_ones(tmp_path, tokenizer):
    questions = write(tmp_path / "test.jsonl", [{"question": QUESTION, "answer": "#### 3"}])
    rows = [{"question": f"How many is {i}?", "answer": f"{i}\n#### {i}"} for i in range(20)]
    rows[3]["question"] = rows[19]["question"] = QUESTION
    rows[5]["question"] += " so" * 200
    write(tmp_path / "train.jsonl", rows)
    for asked in (questions, tmp_path):  # the file, and the folder with the test split
        found = load_dataset(config("gsm8k", tmp_path, asked, max_tokens=100), Encoder(tokenizer), 128)
        texts = [*found.train_texts, *found.validation_texts]
        assert [example.gold for example in texts] == [str(i) for i in range(20) if i not in (3, 5, 19)]
        assert found.counts["rows"] == 20 and found.counts["too_long"] == 1
        assert found.counts["contaminated"] == {str(asked): 2}
    assert load_dataset(config("gsm8k", tmp_path), Encoder(tokenizer), 128).counts["contaminated"] == {}


def test_separate_validation_split_is_kept(tmp_path, tokenizer):
    """It is GLUE's evaluation itself."""
    lines = [f"{QUESTION}\t1", "a good one\t1", "a bad one\t0"]
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *lines, ""]))
    write(tmp_path / "test.jsonl", [{"question": QUESTION}])
    found = load_dataset(config("sst2", tmp_path, tmp_path / "test.jsonl"), Encoder(tokenizer), 128)
    assert (len(found.train), len(found.validation)) == (2, 3) and found.counts["rows"] == 6
    assert found.counts["too_long"] == 0


def test_nothing_left_is_an_error(tmp_path, tokenizer):
    rows = write(tmp_path / "test.jsonl", [{"question": QUESTION, "answer": "3"}])
    with pytest.raises(RuntimeError, match=r"none of the 1 rows is left.*dataset\.decontaminate=\['.*test\.jsonl'\]"):
        load_dataset(config("gsm8k", rows, rows), Encoder(tokenizer), 128)


@pytest.mark.parametrize("value", ["gsm9k", "[gsm8k,nowhere.jsonl]", "5", "[[gsm8k]]"])
def test_rejects_unknown_evaluations(value):
    with pytest.raises(UsageError, match=r"dataset\.decontaminate=.* valid: gsm8k, humaneval, math, mmlu"):
        run_config(f"dataset.decontaminate={value}")


def identity(*overrides):
    settings = run_config("model=tiny", *overrides).to_dict()
    return config_hash(settings, local_fingerprints(settings, None))


def test_the_evaluations_enter_the_configuration_s_hash_by_content_and_the_cache_does_not(tmp_path):
    one, copy, other = (tmp_path / f"{name}.jsonl" for name in ("one", "copy", "other"))
    for file in (one, copy):
        write(file, [{"question": QUESTION}])
    write(other, [{"question": PROGRAM}])
    asked = f"dataset.decontaminate={one}"
    assert identity(asked) == identity(f"dataset.decontaminate=[{copy}]") != identity()
    assert identity(asked) != identity(f"dataset.decontaminate={other}")
    assert identity("dataset.decontaminate=humaneval") not in (identity(), identity("dataset.decontaminate=gsm8k"))
    assert identity("dataset.cache=/elsewhere") == identity()


REAL = [
    ("gsm8k/test.jsonl", "alpaca", "instruct/math_data.json.gz", 3260, 1055),  # as its own documentation counts them
    ("gsm8k/test.jsonl", "gsm8k", "gsm8k/train.jsonl.gz", 7473, 4),
    ("gsm8k/test.jsonl", "alpaca", "instruct/alpaca_random_9k.json.gz", 9229, 0),
    ("humaneval/HumanEval.jsonl.gz", "alpaca", "instruct/code_alpaca_2k.json", 2017, 1),
    ("mmlu", "alpaca", "instruct/alpaca_random_9k.json.gz", 9229, 1),
]


@pytest.mark.parametrize(("evaluation", "name", "path", "rows", "contaminated"), REAL)
def test_real_training_sets_against_real_evaluations(evaluation, name, path, rows, contaminated):
    examples = list(DATASETS[name].train(config(name, shared(f"data/{path}"))))
    clean, dropped = without_questions(examples, str(shared(f"data/{evaluation}")))
    assert len(examples) == rows and list(dropped.values()) == [contaminated] and len(clean) == rows - contaminated


def test_real_backward_reasoning_questions():
    """All 1,270 are GSM8K test questions with a hidden number; those that keep 13 consecutive words are removed."""
    with gzip.open(shared("data/instruct/GSM8K_Backward.jsonl.gz"), "rt") as stream:
        rows = [json.loads(line) for line in stream]
    questions = list(questions_of(str(SHARED / "data/gsm8k/test.jsonl")))
    clean, _ = without_questions([Example(row["question"], "") for row in rows], str(SHARED / "data/gsm8k/test.jsonl"))
    assert (len(rows), len(clean)) == (1270, 39)
    whole = sum(any(question in row["question"] for question in questions) for row in rows[:100])
    assert whole == 0, "none is there word for word"


def test_every_humaneval_problem_is_found_in_the_form_of_codefeedback():
    """As a query in Alpaca's template, as the opening of an answer, and as its docstring in a sentence."""
    problems = list(questions_of(str(shared("data/humaneval/HumanEval.jsonl.gz"))))
    questions = Questions(problems)
    assert len(problems) == 164 and questions.short == 0
    assert all(questions.occur_in(f"Complete the function.\n\n{problem}\n\n### Response:\n") for problem in problems)
    told = [problem.rpartition("def ")[2].split("\n", 1)[1] for problem in problems]
    assert sum(questions.occur_in(" ".join(text.split())) for text in told) >= 155


def test_doctests():
    assert doctest.testmod(contamination).failed == 0
