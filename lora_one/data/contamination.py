"""Remove training rows that contain an evaluation's questions, by the 13-gram overlap of GPT-3's analysis.

A row contains a question if the two share 13 consecutive words (arXiv:2005.14165, appendix C). A search for whole
questions would miss partial copies: another number, missing imports, only the docstring. A word is a run of letters and
digits in lower case, so punctuation, line breaks and code symbols do not matter. As in that analysis, a question of 8
to 12 words must occur as a whole, and a shorter one is not searched for, because it is too common a phrase. A 13-gram
that occurs in more than 10 questions is part of their format and is ignored.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from lora_one.datasets.questions import evaluations_in, questions_of
from lora_one.distributed import Processes
from lora_one.types import Example

WORDS, FEWEST = 13, 8
FORMAT = 10  # an n-gram that occurs in more questions than this is part of their format
WORD = re.compile(r"[^\W_]+")


class Questions:
    """The questions of one evaluation as n-grams.

    count: number of questions.  short: number of those with too few words to be searched for.
    """

    def __init__(self, texts: Sequence[str]):
        sought: Counter[tuple[str, ...]] = Counter()
        self.count, self.short = len(texts), 0
        for text in texts:
            words = words_of(text)
            self.short += len(words) < FEWEST
            if len(words) >= FEWEST:
                sought.update(set(in_a_row(words, min(len(words), WORDS))))
        self.by_length: dict[int, set[tuple[str, ...]]] = {}
        for words, questions in sought.items():
            if questions <= FORMAT:
                self.by_length.setdefault(len(words), set()).add(words)

    def occur_in(self, text: str) -> bool:
        """Return whether a text contains one of the questions."""
        words = words_of(text)
        return any(not sought.isdisjoint(in_a_row(words, length)) for length, sought in self.by_length.items())


def words_of(text: str) -> list[str]:
    """Return the words of a text that are compared.

    >>> words_of("Janet's ducks lay\\n16 eggs. def has_close(x):")
    ['janet', 's', 'ducks', 'lay', '16', 'eggs', 'def', 'has', 'close', 'x']
    """
    return WORD.findall(text.lower())


def in_a_row(words: list[str], length: int) -> Iterable[tuple[str, ...]]:
    """Return every ``length`` consecutive words."""
    return zip(*(words[start:] for start in range(length)), strict=False)


class Search:
    """The search for the questions of evaluations in training rows.

    decontaminate: the value of the configuration.  rows: number of rows of the last search.  removed: those with a
    question, for each evaluation; a row is counted once, for the first evaluation found in it.
    Raises UsageError: a local file has no column of questions; RunError: a file cannot be read.
    """

    def __init__(self, decontaminate: Any):
        self.questions: dict[Any, Questions] = {}
        content = hashlib.sha256()
        for evaluation in dict.fromkeys(evaluations_in(decontaminate)):
            texts = list(questions_of(evaluation))
            content.update(json.dumps(texts).encode() + b"\n")
            self.questions[evaluation] = Questions(texts)
        self.content = content.hexdigest()
        self.rows, self.removed = 0, dict.fromkeys(self.questions, 0)

    def clean(self, examples: Iterable[Example]) -> Iterator[Example]:
        """Yield the examples without a question, in order, and count."""
        self.rows, self.removed = 0, dict.fromkeys(self.questions, 0)
        for example in examples:
            self.rows += 1
            text = f"{example.prompt}\n{example.response}"
            found = next((name for name, questions in self.questions.items() if questions.occur_in(text)), None)
            if found is None:
                yield example
            else:
                self.removed[found] += 1

    def report(self) -> None:
        """Print how many rows were removed; only on the first process."""
        rows = self.rows
        for evaluation, questions in self.questions.items() if Processes.current().rank == 0 else ():
            short = f"; {questions.short} questions of fewer than {FEWEST} words were not searched for"
            print(
                f"data: {self.removed[evaluation]} of {rows} training rows contain one of the {questions.count} "
                f"questions of {evaluation} and were removed{short if questions.short else ''}"
            )
            rows -= self.removed[evaluation]
