r"""The comparison of LoRA-SB's MATH script: two answers, after the data set's normalisation, that count as equal.

Source: instruction_tuning_eval/grader.py of CERT-Lab/lora-sb. Expressions are read by math-verify here, by sympy's
LaTeX parser there.
"""

from math import isclose
from typing import Any

from lora_one.evaluation.equality import expressions, same

CLOSING = {"(": ")", "[": "]"}


def equal_as_published(gold: str, answer: str) -> bool:
    """Return whether the published script counts the answer as equal to the gold answer; there is no time limit here.

    Two numbers: up to 1e-4 of their size, also if one of them is 100 times the other (percent). Otherwise: equal
    without braces and parentheses, equal part by part (intervals, tuples), or equal expressions.

    >>> equal_as_published("10000", "10,000"), equal_as_published("50", "0.5"), equal_as_published("(1,2)", "1,2")
    (True, True, True)
    """
    numbers = number(gold), number(answer)
    if None not in numbers:
        wanted, found = numbers
        return any(isclose(value, found, rel_tol=1e-4) for value in (wanted / 100, wanted, 100 * wanted))
    if not answer:
        return False
    return without_brackets(gold, answer) or equal_parts(gold, answer) or equal_expressions(gold, answer)


def number(text: str) -> float | None:
    """Return the number of a text of digits, with commas at will; None: it is not a number."""
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def bracket(text: str) -> str | None:
    """Return the bracket that encloses the text; None: there is none."""
    return text[0] if text.startswith(tuple(CLOSING)) and text.endswith(CLOSING[text[0]]) and len(text) > 1 else None


def without_brackets(gold: str, answer: str) -> bool:
    """Return whether the texts are equal without braces and parentheses; square brackets may be missing around one."""
    other = {"(": "[", "[": "("}.get(bracket(answer) or "")
    if other is not None and not gold.startswith(other):
        gold, answer = gold.strip("[]()"), answer.strip("[]()")
    left_out = str.maketrans("", "", "{}()")
    return gold.translate(left_out) == answer.translate(left_out)


def equal_parts(gold: str, answer: str) -> bool:
    """Return whether both are in brackets of one kind, and their parts between commas are equal."""
    if bracket(gold) is None or bracket(gold) != bracket(answer):
        return False
    parts = [text[1:-1].split(",") for text in (gold, answer)]
    return len(parts[0]) == len(parts[1]) and all(map(equal_as_published, *parts))


def equal_expressions(gold: str, answer: str) -> bool:
    """Return whether math-verify finds the expressions equal, or their values are equal up to 1e-3."""
    truth, found = expressions(gold), expressions(answer)
    if same(truth, found):
        return True
    values = [value_of(read[0]) if read else None for read in (truth, found)]
    return None not in values and isclose(*values, rel_tol=1e-3)


def value_of(expression: Any) -> float | None:
    """Return the value of a sympy expression; None: it has none, such as an equation or x + 1."""
    try:
        return float(expression.evalf())
    except (AttributeError, TypeError, ValueError, OverflowError):
        return None
