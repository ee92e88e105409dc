"""The generated word problems: right answers, distinct questions, the same rows for the same seed."""

import re
import subprocess
import sys

import pytest

from lora_one.datasets.arithmetic import (
    FAMILIES,
    MAX_FRUITLESS_DRAWS,
    PRETRAIN_FAMILIES,
    TARGET_FAMILY,
    as_text,
    generate,
    generate_meta_math,
)

ROWS_PER_FAMILY = 500
MARK = re.compile(r"(\d+)([-+*])(\d+)=<<(\d+)([-+*])(\d+)=(\d+)>>(\d+)")


def evaluated(left: str, operator: str, right: str) -> int:
    """The value of a calculation, apart from the generator's own table of operators."""
    return {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[operator](int(left), int(right))


def expected_answer(family: str, question: str) -> int:
    """Solve a question from its numbers and its words "more" and "fewer" alone."""
    start, *changes = map(int, re.findall(r"\d+", question))
    sign = -1 if "fewer" in question else 1
    rules = {
        "gain": lambda: start + changes[0],
        "loss": lambda: start - changes[0],
        "combine": lambda: start + changes[0],
        "doubling": lambda: start + start,
        "comparison": lambda: start + sign * changes[0],
        "comparison_total": lambda: 2 * start + sign * changes[0],
        "gain_then_loss": lambda: start + changes[0] - changes[1],
        "reverse_comparison_total": lambda: 2 * start - sign * changes[0],
    }
    return rules[family]()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_final_number_solves_the_question(family):
    for row in generate([family], ROWS_PER_FAMILY, seed=0):
        final = int(row["answer"].rsplit("\n#### ", 1)[1])
        assert final == expected_answer(family, row["question"]), row


@pytest.mark.parametrize("family", FAMILIES)
def test_every_calculator_mark_holds_and_the_last_one_is_the_answer(family):
    for row in generate([family], ROWS_PER_FAMILY, seed=1):
        *lines, last = row["answer"].split("\n")
        assert last.startswith("#### ")
        marks = [MARK.search(line) for line in lines]
        assert all(marks), row
        for mark in marks:
            assert mark.groups()[:3] == mark.groups()[3:6], "the mark repeats the text before it"
            assert int(mark[7]) == int(mark[8]) == evaluated(*mark.groups()[:3])
        assert marks[-1][7] == last.removeprefix("#### ")


@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_stay_between_2_and_99(family):
    for row in generate([family], ROWS_PER_FAMILY, seed=2):
        assert all(2 <= int(number) <= 99 for number in re.findall(r"\d+", row["question"] + row["answer"])), row


def test_reading_more_as_plus_never_solves_the_target():
    for row in generate([TARGET_FAMILY], ROWS_PER_FAMILY, seed=3):
        misread = expected_answer("comparison_total", row["question"])
        assert misread != expected_answer(TARGET_FAMILY, row["question"]), row


def test_pretraining_leaves_out_exactly_the_target():
    assert {*PRETRAIN_FAMILIES, TARGET_FAMILY} == set(FAMILIES)
    assert TARGET_FAMILY not in PRETRAIN_FAMILIES


def test_questions_are_distinct_at_the_sizes_the_demonstration_needs():
    for families, size in [(PRETRAIN_FAMILIES, 20_000), ([TARGET_FAMILY], 10_000)]:
        assert len({row["question"] for row in generate(families, size, seed=0)}) == size


def test_families_alternate():
    rows = generate(["gain", "loss"], 5, seed=0)
    assert [row["family"] for row in rows] == ["gain", "loss", "gain", "loss", "gain"]


def test_a_longer_request_starts_with_the_shorter_one():
    assert generate(["gain", "loss"], 40, seed=5)[:15] == generate(["gain", "loss"], 15, seed=5)


def test_the_seed_decides():
    assert generate(["gain"], 20, seed=1) == generate(["gain"], 20, seed=1)
    assert generate(["gain"], 20, seed=1) != generate(["gain"], 20, seed=2)


def test_another_process_with_other_string_hashes_draws_the_same_rows():
    imports = "from lora_one.datasets.arithmetic import FAMILIES, generate, generate_meta_math"
    code = f"{imports}; print(generate(list(FAMILIES), 20, 7), generate_meta_math(9, 7))"
    environment = {"PYTHONHASHSEED": "123", "PYTHONPATH": ":".join(filter(None, sys.path))}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == f"{generate(list(FAMILIES), 20, 7)} {generate_meta_math(9, 7)}"


def test_excluded_questions_do_not_occur():
    test_questions = {row["question"] for row in generate([TARGET_FAMILY], 2_000, seed=0)}
    again = {row["question"] for row in generate([TARGET_FAMILY], 2_000, seed=0, exclude=test_questions)}
    assert len(again) == 2_000
    assert not again & test_questions


def test_size_zero_generates_nothing():
    assert generate(["gain"], 0, seed=0) == []
    assert generate_meta_math(0, seed=0) == []


@pytest.mark.parametrize("families", [["algebra"], ["gain", "algebra"], []])
def test_unknown_or_no_families_are_refused_with_the_known_ones(families):
    with pytest.raises(ValueError, match="must name at least one of gain, loss"):
        generate(families, 1, seed=0)


def test_a_negative_size_is_refused():
    with pytest.raises(ValueError, match="size=-1 must be at least 0"):
        generate(["gain"], -1, seed=0)
    with pytest.raises(ValueError, match="size=-1 must be at least 0"):
        generate_meta_math(-1, seed=0)


def test_a_family_without_new_questions_is_refused(monkeypatch):
    monkeypatch.setitem(FAMILIES, "constant", lambda rng: ("What is 1+1?", "1+1=<<1+1=2>>2\n#### 2"))
    assert len(generate(["constant"], 1, seed=0)) == 1
    with pytest.raises(
        ValueError, match=f"'constant' produced no new question in {MAX_FRUITLESS_DRAWS} draws.*lower the size"
    ):
        generate(["constant"], 2, seed=0)


def test_prompts_end_where_the_answer_begins():
    (prompt, response) = as_text([{"question": "1+1?", "answer": "#### 2"}])[0]
    assert (prompt, response) == ("Q: 1+1?\nA: ", "#### 2")


def test_meta_math_rows_have_its_fields_and_endings():
    rows = generate_meta_math(300, seed=0)
    for row in rows:
        assert set(row) == {"query", "response", "type", "original_question"}
        assert re.search(r"\n#### (\d+|-\d+)\nThe answer is: \1\Z", row["response"]), row
        assert row["original_question"] in row["query"]
        assert (row["query"] != row["original_question"]) == (row["type"] == "GSM_Rephrased")
    assert {row["type"] for row in rows} == {"GSM_AnsAug", "GSM_Rephrased", "MATH_AnsAug"}
    assert len({row["original_question"] for row in rows}) == 300
