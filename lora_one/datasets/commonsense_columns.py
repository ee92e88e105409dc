"""A row of the commonsense sets in the form of LLM-Adapters -> the columns of the original set, as lm_eval reads them.

The names of the columns are those of lm_eval 0.4.13's tasks. What the form has lost:

- boolq: the passages. The column ``passage`` is empty, so results are not comparable with published ones.
- hellaswag: the file of LLM-Adapters keeps the mark-up of WikiHow, which lm_eval removes. ``ctx_b`` is the rest of the
  text after its last sentence, if the text ends without a full stop; the original boundary is not marked.
- social_i_qa: the boundary between ``context`` and ``question``. They are split before the last sentence; the prompt,
  which contains both with a space between, does not depend on it.
- ARC-Easy, ARC-Challenge, openbookqa: the labels of the options, which are A to E here. No prompt contains them.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lora_one.datasets.commonsense import WORDS
from lora_one.datasets.sources import read_rows
from lora_one.errors import RunError

Columns = dict[str, Any]
LABELS = "ABCDE"
ANSWER_OPENING = "Please choose the correct answer to the question: "
OPENINGS = {
    "boolq": "Please answer the following question with true or false, question: ",
    "piqa": "Please choose the correct solution to the question: ",
    "social_i_qa": ANSWER_OPENING,
    "hellaswag": "Please choose the correct ending to complete the given sentence: ",
    "winogrande": "Please choose the correct answer to fill in the blank to complete the given sentence: ",
    "ARC-Easy": ANSWER_OPENING,
    "ARC-Challenge": ANSWER_OPENING,
    "openbookqa": ANSWER_OPENING,
}
FORMAT = "Answer format: "
BETWEEN = {"piqa": "\n\n"}  # what separates two options; a space in the other sets
BEFORE_FORMAT = {"winogrande": " "}  # what separates the last option and the format; a blank line in the other sets
SENTENCE_END = re.compile(r"[.!?][\"')]*\s+")
WHOLE = re.compile(r"[.!?\"')]\s*\Z")  # the end of a text that does not stop within a sentence


def read_columns(path: Path, name: str, split: str) -> list[tuple[Columns, str]]:
    """Return (columns, gold word) of each row of a set, from its file or folder.

    Raises RunError: a row is not in the form of LLM-Adapters, or its answer is not one of its words (it is named).
    """
    found = []
    for number, row in enumerate(read_rows(None, str(path), split, ["instruction", "answer"]), start=1):
        try:
            found.append((columns_of(name, row["instruction"], row["answer"]), row["answer"]))
        except ValueError as error:
            raise RunError(
                f"{path}, row {number} ({split}): {error}: pass the file of LLM-Adapters for {name}"
            ) from error
    return found


def columns_of(name: str, instruction: str, answer: str) -> Columns:
    """Return the columns of one row. Raises ValueError: another form, or an answer that is not one of its words.

    >>> columns_of("boolq", OPENINGS["boolq"] + "is it?\\n\\nAnswer format: true/false", "false")
    {'passage': '', 'question': 'is it', 'label': 0}
    """
    text, options, words = parts_of(name, instruction)
    if answer not in words:
        raise ValueError(f"the answer {answer!r} is not one of {', '.join(words)}")
    return COLUMNS[name](text, options, words.index(answer))


def parts_of(name: str, instruction: str) -> tuple[str, list[str], list[str]]:
    """Return the question, its options, and the word of each option; boolq has no options.

    All texts keep their white space.  Raises ValueError: the instruction has another form.
    """
    opening = OPENINGS[name]
    body, found, form = instruction.rpartition(FORMAT)
    words = form.split("/")
    if not found or not instruction.startswith(opening):
        raise ValueError(f"{instruction[:60]!r}... is not {opening + '... ' + FORMAT + '...'!r}")
    if words != list(WORDS[name][: len(words)]):
        raise ValueError(f"{FORMAT + form!r} does not begin with the words {', '.join(WORDS[name])}")
    body = body[len(opening) :]
    ending = BEFORE_FORMAT.get(name, "\n\n")
    if name == "boolq":
        return body.removesuffix(ending), [], words
    marks = [f"{word[0].upper()}{word[1:]}: " for word in words]
    between = map(re.escape, ["\n\n", *[BETWEEN.get(name, " ")] * (len(words) - 1)])
    pattern = "".join(f"{gap}{re.escape(mark)}(.*?)" for gap, mark in zip(between, marks, strict=True))
    matched = re.fullmatch(f"(.*?){pattern}{re.escape(ending)}", body, re.DOTALL)
    if matched is None:
        raise ValueError(f"{instruction[:60]!r}... does not contain the options {', '.join(words)} in this order")
    text, *options = matched.groups()
    return text, options, words


def boolq(text: str, options: Sequence[str], gold: int) -> Columns:
    """Return the columns of a question without its passage; the words are true and false, the labels 1 and 0."""
    return {"passage": "", "question": text.removesuffix("?"), "label": 1 - gold}


def piqa(text: str, options: Sequence[str], gold: int) -> Columns:
    return {"goal": text, "sol1": options[0], "sol2": options[1], "label": gold}


def social_i_qa(text: str, options: Sequence[str], gold: int) -> Columns:
    """Return the columns, with the text split before its last sentence, or else after its first word."""
    ends = [found.end() for found in SENTENCE_END.finditer(text)]
    place = ends[-1] if ends else text.find(" ") + 1
    answers = {f"answer{label}": option for label, option in zip(LABELS, options, strict=False)}
    return {"context": text[:place].removesuffix(" "), "question": text[place:], **answers, "label": str(gold + 1)}


def hellaswag(text: str, options: Sequence[str], gold: int) -> Columns:
    """Return the columns; ``ctx_b`` is the incomplete sentence at the end, or empty."""
    label, _, context = text.partition(": ")
    ends = [found.end() for found in SENTENCE_END.finditer(context)]
    place = len(context) if WHOLE.search(context) or not ends else ends[-1]
    first, second = context[:place].removesuffix(" "), context[place:]
    return {"activity_label": label, "ctx_a": first, "ctx_b": second, "endings": list(options), "label": str(gold)}


def winogrande(text: str, options: Sequence[str], gold: int) -> Columns:
    return {"sentence": text, "option1": options[0], "option2": options[1], "answer": str(gold + 1)}


def arc(text: str, options: Sequence[str], gold: int) -> Columns:
    return {"question": text, **choices(options, gold)}


def openbookqa(text: str, options: Sequence[str], gold: int) -> Columns:
    return {"question_stem": text, **choices(options, gold)}


def choices(options: Sequence[str], gold: int) -> Columns:
    """Return the columns of labelled options."""
    labels = list(LABELS[: len(options)])
    return {"choices": {"text": list(options), "label": labels}, "answerKey": labels[gold]}


COLUMNS: dict[str, Callable[[str, Sequence[str], int], Columns]] = {
    "boolq": boolq,
    "piqa": piqa,
    "social_i_qa": social_i_qa,
    "hellaswag": hellaswag,
    "winogrande": winogrande,
    "ARC-Easy": arc,
    "ARC-Challenge": arc,
    "openbookqa": openbookqa,
}
"""Set -> the function that makes its columns from (question, options, index of the gold option)."""
