"""The questions of the commonsense sets as lm_eval 0.4.13 asks them: an option is a continuation of the question.

The model reads neither a list of the options nor their words. In winogrande each option is put into the sentence, and
the rest of the sentence is its continuation.

Solved examples come from the training file of the set; without one, they are the first rows of the test file, which are
then not scored. They are the same for each question, whereas lm_eval draws other ones for each question.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_one.datasets.commonsense import WORDS
from lora_one.datasets.commonsense_columns import Columns, read_columns
from lora_one.errors import UsageError
from lora_one.types import Example


@dataclass(frozen=True)
class Choice:
    """A question with its options.

    text: the question as it is shown in predictions.jsonl.  contexts, continuations: for each option, a text, and its
    continuation whose likelihood is compared; a space is put between them.  options: their texts.  gold: an index.
    """

    text: str
    contexts: Sequence[str]
    continuations: Sequence[str]
    options: Sequence[str]
    gold: int

    @property
    def solved(self) -> str:
        """Return the question with its gold answer, as part of a prompt."""
        return f"{self.contexts[self.gold]} {self.continuations[self.gold]}\n\n"


def choice(text: str, options: Sequence[str], gold: int) -> Choice:
    """Return a question whose options continue the same text."""
    return Choice(text, [text] * len(options), options, options, gold)


def boolq(row: Columns) -> Choice:
    return choice(f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ["no", "yes"], row["label"])


def piqa(row: Columns) -> Choice:
    return choice(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], row["label"])


def social_i_qa(row: Columns) -> Choice:
    answers = [row[f"answer{label}"] for label in "ABC"]
    return choice(f"Q: {row['context']} {row['question']}\nA:", answers, int(row["label"]) - 1)


def hellaswag(row: Columns) -> Choice:
    """Return the context with its last part capitalised, without the mark-up of WikiHow."""
    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return choice(without_markup(context), [without_markup(ending) for ending in row["endings"]], int(row["label"]))


def winogrande(row: Columns) -> Choice:
    """Return the sentence up to the blank with each option in it, and the rest of the sentence after each."""
    before, _, after = row["sentence"].partition("_")
    options = [row["option1"], row["option2"]]
    contexts = [before + option for option in options]
    return Choice(row["sentence"], contexts, [after.strip()] * 2, options, int(row["answer"]) - 1)


def arc(row: Columns) -> Choice:
    return choice(f"Question: {row['question']}\nAnswer:", *labelled(row))


def openbookqa(row: Columns) -> Choice:
    return choice(row["question_stem"], *labelled(row))


def labelled(row: Columns) -> tuple[list[str], int]:
    """Return the texts of labelled options and the index of the gold one."""
    return row["choices"]["text"], row["choices"]["label"].index(row["answerKey"])


def without_markup(text: str) -> str:
    """Return the text without WikiHow's marks: a title begins a new sentence, other brackets are removed.

    >>> without_markup("[header] How to rest [title] Lie down. [step] Sleep.")
    ' How to rest. Lie down. Sleep.'
    """
    marked = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", marked).replace("  ", " ")


TASKS: dict[str, Callable[[Columns], Choice]] = {
    "boolq": boolq,
    "piqa": piqa,
    "social_i_qa": social_i_qa,
    "hellaswag": hellaswag,
    "winogrande": winogrande,
    "ARC-Easy": arc,
    "ARC-Challenge": arc,
    "openbookqa": openbookqa,
}
"""Set -> the function that makes a question from its columns."""
WORDS_IN_ORDER = {"boolq": ("false", "true")}  # of its options, no and yes


@dataclass(frozen=True)
class ChoiceExample(Example):
    """A question of a set.

    shots: solved examples, each as it is part of the prompt.  words: the word of each option.
    """

    choice: Choice | None = None
    shots: str = ""
    words: tuple[str, ...] = ()
    num_fewshot: int = 0


def examples_of(folder: Path, name: str, num_fewshot: int) -> list[ChoiceExample]:
    """Return the questions of a set after ``num_fewshot`` solved examples, with ids ``<name>/<number of the row>``.

    Raises UsageError: there are fewer solved examples.  RunError: a row has another form.
    """
    tests = read_columns(folder, name, "test")
    trained = folder.is_dir() and any(folder.glob("train.json*"))
    solved, source = (read_columns(folder, name, "train"), "training") if trained else (tests[:-1], "test")
    if num_fewshot > len(solved):
        besides = "" if trained else " and no training file, and one row must be left to score"
        raise UsageError(
            f"--num_fewshot={num_fewshot} exceeds the number of solved examples of {name}: {folder} has "
            f"{len(solved) + (not trained)} {source} rows{besides}: pass at most {len(solved)}"
        )
    shots = "".join(TASKS[name](row).solved for row, _ in solved[:num_fewshot])
    found = []
    for number, (row, word) in list(enumerate(tests))[0 if trained else num_fewshot :]:
        asked = TASKS[name](row)
        words = WORDS_IN_ORDER.get(name, WORDS[name])[: len(asked.options)]
        parts = {"choice": asked, "shots": shots, "words": words, "num_fewshot": num_fewshot}
        answer = f" {asked.continuations[asked.gold]}"
        found.append(ChoiceExample(shots + asked.text, answer, word, f"{name}/{number}", **parts))
    return found
