"""GSM8K: extraction and comparison of final answers, ours and the published one."""

import re
from collections.abc import Sequence
from decimal import Decimal
from math import sqrt
from typing import Any

from lora_one.data.gsm8k import rows_of
from lora_one.errors import RunError
from lora_one.types import Example

MAX_NEW_TOKENS = 512
MARKERS = ("####", "The answer is")
NUMBER = re.compile(
    r"""\s*:?\s*
    (?P<sign>[-+\u2212]?)\s*\$?\s*(?P<sign2>[-+\u2212]?)
    (?P<digits>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)
    (?!\d|[,./:^-]\d|[ ]\d|[eE][-+]?\d|[\u00bc-\u00be\u2150-\u215e])  # goes on in a form that is not one of ours""",
    re.VERBOSE,
)
PUBLISHED = re.compile(r"####\s*(\d+)")


def examples(data_path: str | None) -> list[Example]:
    """The test split, of the hub or of a local file or folder; zero-shot prompts ``Q: ...\\nA: ``.

    Raises RunError: a gold answer that is no number (the row is named).
    """
    found = rows_of(data_path, "test")
    for number, example in enumerate(found, start=1):
        if not is_number(example.gold):
            raise RunError(f"row {number}: the gold answer {example.gold!r} is no number behind ####: check the file")
    return found


def is_number(gold: str | None) -> bool:
    """Whether predictions can be compared with it."""
    return gold is not None and parse(f"#### {gold}") is not None


def parse(completion: str) -> Decimal | None:
    """The number behind the last ``####``, else behind the last ``The answer is``, else None: unparsed.

    Optional are a sign, $, thousands commas, decimals, a trailing full stop or %.

    >>> parse("so 5 * 200 = 1000\\n#### $1,000."), parse("The answer is: -2.50"), parse("I think it is 7")
    (Decimal('1000'), Decimal('-2.50'), None)
    """
    for marker in MARKERS:
        _, found, tail = completion.rpartition(marker)
        match = NUMBER.match(tail) if found else None
        if match:
            sign = "-" if ("-" in match["sign"] + match["sign2"] or "\u2212" in match["sign"] + match["sign2"]) else ""
            return Decimal(sign + match["digits"].replace(",", ""))
    return None


def parse_published(text: str) -> int:
    """As the published script: the first run of digits behind ``####``, and 0 where there is none."""
    match = PUBLISHED.search(text)
    return int(match[1]) if match else 0


def score(example_id: Any, prompt: str, completion: str, gold: str) -> dict[str, Any]:
    """One line of predictions.jsonl. gold is the text behind ``####``. Raises ValueError: gold is no number."""
    truth = parse(f"#### {gold}")
    if truth is None:
        raise ValueError(f"the gold answer {gold!r} of example {example_id} is no number")
    prediction = parse(completion)
    return {
        "id": example_id,
        "prompt": prompt,
        "completion": completion,
        "prediction": None if prediction is None else str(prediction),
        "gold": gold,
        "correct": prediction is not None and prediction == truth,
        "correct_official": parse_published(completion) == parse_published(f"#### {gold}"),
    }


def summarize(predictions: Sequence[dict[str, Any]]) -> tuple[dict[str, float], dict[str, int]]:
    """(metrics, counts): accuracy and accuracy_official, each with its standard error sqrt(p (1 - p) / n)."""
    total = len(predictions)
    correct = sum(line["correct"] for line in predictions)
    unparsed = sum(line["prediction"] is None for line in predictions)
    official = sum(line["correct_official"] for line in predictions)
    metrics = {}
    for name, hits in (("accuracy", correct), ("accuracy_official", official)):
        share = hits / total
        metrics |= {name: share, f"{name}_stderr": sqrt(share * (1 - share) / total)}
    counts = {"correct": correct, "wrong": total - correct - unparsed, "unparsed": unparsed, "total": total}
    return metrics, counts
