"""GSM8K, zero-shot or few-shot: extract and compare the final numbers, by our rules and by the published ones."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from lora_one.datasets.gsm8k import read_problems
from lora_one.errors import RunError, UsageError
from lora_one.evaluation.benchmark import Benchmark
from lora_one.evaluation.gsm8k_shots import SHOTS
from lora_one.evaluation.options import EvaluationOptions, option
from lora_one.evaluation.scoring import prediction_line
from lora_one.evaluation.shares import by_kind, counts_of, shares
from lora_one.types import Example

LM_EVAL_TOKENS = 256  # its limit where a task names none, as gsm8k_cot
STOP = ("Q:", "</s>", "<|im_end|>")  # stop texts of few-shot completions
THOUSANDS = r"(?:,|\{,\}|\\[,;!]|[\u00a0\u2009\u202f'\u2019])"  # with LaTeX's and other separators
OPERATION = r"(?:[-+*\u00d7x/=\u2212\u2013\u00f7]|\\times|\\cdot|\\div)"
NUMBER = re.compile(
    rf"""\s*:?\s*
    (?P<sign>[-+\u2212]?)\s*\$?\s*(?P<sign2>[-+\u2212]?)
    (?P<digits>\d{{1,3}}(?:{THOUSANDS}\d{{3}})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)
    (?![ ]*{OPERATION}[ ]*\$?\d)  # not the first number of a calculation
    (?!\d|[,./:-]\d|[ ]\d|[eE][-+]?\d|[\u00bc-\u00be\u2150-\u215e])  # not followed by the rest of another notation
    (?!\^|\(\d|{THOUSANDS}\d|[ ]*(?:hundred|thousand|million|billion)\b)""",
    re.VERBOSE,
)
EMPTY = re.compile(r"(?:####\s*)+\Z")  # markers at the end without a number
HEADING = re.compile(r"\s*\d+[.)][ \t]+\S")  # "#### 2. Check the result", as chat models divide their answers
PUBLISHED = re.compile(r"####\s*(\d+)")
# The task gsm8k_cot of lm_eval, version 3: its two filters, and the parts of a text that its comparison ignores
STRICT = re.compile(r"The answer is (\-?[0-9\.\,]+).")
FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
IGNORED = tuple(map(re.compile, (",", r"\$", r"(?s).*#### ", r"\.$")))
KINDS = {"accuracy": "correct", "accuracy_official": "correct_official", "accuracy_flexible": "correct_flexible"}


def test_problems(data_path: str | None, num_fewshot: int = 0) -> list[Example]:
    """Return the test split, from the hub or a local file or folder; zero-shot prompts are ``Q: ...\\nA: ``.

    Few-shot prompts end in ``A:``, because in the solved examples the space is part of the answer.
    Raises RunError: a gold answer is not a number (the row is named).
    """
    found = read_problems(data_path, "test")
    for number, example in enumerate(found, start=1):
        if not is_number(example.gold):
            raise RunError(f"row {number}: the gold answer {example.gold!r} is not a number after ####: check the file")
    solved = "".join(shot.text for shot in SHOTS[:num_fewshot])
    return [replace(example, prompt=solved + example.prompt.rstrip(" ")) for example in found] if solved else found


def is_number(gold: str | None) -> bool:
    """Return whether a gold answer is a number, so that predictions can be compared with it."""
    return gold is not None and parse(f"#### {gold}") is not None


def parse(completion: str) -> Decimal | None:
    """Return the number after the last ``####``, else after the last ``The answer is``; None: unparsed.

    The number may have a sign, $, separators of thousands, decimals, and a full stop or % after it. A numbered heading
    does not count if ``The answer is`` follows it.

    >>> parse("so 5 * 200 = 1000\\n#### $1,000."), parse("The answer is: -2.50"), parse("I think it is 7")
    (Decimal('1000'), Decimal('-2.50'), None)
    """
    text = EMPTY.sub("", completion)
    _, _, end = text.rpartition("####")
    if HEADING.match(end) and (below := number_after("The answer is", end)) is not None:
        return below
    found = number_after("####", text)
    return number_after("The answer is", text) if found is None else found


def number_after(marker: str, text: str) -> Decimal | None:
    """Return the number after the last marker; None: there is no marker, or no number after it."""
    _, found, tail = text.rpartition(marker)
    match = NUMBER.match(tail) if found else None
    if match is None:
        return None
    sign = "-" if {"-", "\u2212"} & {match["sign"], match["sign2"]} else ""
    return Decimal(sign + re.sub(r"[^\d.]", "", match["digits"]))


def parse_published(text: str) -> int:
    """Return the number that the published script finds: the first digits after ``####``, or 0 if there are none."""
    match = PUBLISHED.search(text)
    return int(match[1]) if match else 0


def after_examples(prompt: str) -> bool:
    """Return whether a prompt begins with the solved examples; the published scores are then those of lm_eval."""
    return prompt.startswith(SHOTS[0].text)


def extracted(pattern: re.Pattern[str], text: str, place: int) -> str:
    """Return the match at ``place`` (0: first, -1: last), or ``[invalid]``, as lm_eval's regex filter does."""
    matches = list(pattern.finditer(text))
    return next(group for group in matches[place].groups() if group).strip() if matches else "[invalid]"


def same_text(prediction: str, gold: str) -> bool:
    """Return whether the answers are equal by lm_eval's exact_match with the settings of gsm8k_cot."""
    one, other = (compared(text) for text in (prediction, gold))
    return one == other


def compared(text: str) -> str:
    """Return the text in the form in which exact_match compares it."""
    for pattern in IGNORED:
        text = pattern.sub("", text)
    return text.lower()


@dataclass(frozen=True, kw_only=True)
class GSM8KOptions(EvaluationOptions):
    """Options of GSM8K."""

    max_new_tokens: int | None = option(
        None,
        type=int,
        help="maximum number of new tokens per completion (default: 512; with --num_fewshot 256, as lm_eval)",
        decides="completions",
    )
    num_fewshot: int = option(
        0,
        help="number of chain-of-thought examples before each problem, at most 8 (%(default)s)",
        decides="completions",
    )


class GSM8K(Benchmark[GSM8KOptions]):
    """GSM8K, on its test split."""

    options = GSM8KOptions

    def check(self, options: GSM8KOptions) -> GSM8KOptions:
        """Fill in the number of tokens, and the stop texts of few-shot completions.

        Raises UsageError: more examples than published.
        """
        if not 0 <= options.num_fewshot <= len(SHOTS):
            raise UsageError(
                f"--num_fewshot={options.num_fewshot} must be between 0 and {len(SHOTS)}, the number of published "
                "examples: pass another number or leave it out"
            )
        tokens = options.max_new_tokens or (LM_EVAL_TOKENS if options.num_fewshot else EvaluationOptions.max_new_tokens)
        return replace(options, max_new_tokens=tokens, stop=STOP if options.num_fewshot else ())

    def examples(self, options: GSM8KOptions) -> list[Example]:
        """Return the test problems."""
        return test_problems(options.data_path, options.num_fewshot)

    def score(self, example_id: Any, prompt: str, completion: str, gold: str) -> dict[str, Any]:
        """Return one line of predictions.jsonl; gold: the text after ``####``.

        ``correct_official`` is the result of the published script; for few-shot prompts, that of lm_eval's strict
        filter. ``correct_flexible``, only for few-shot prompts, is that of its flexible filter.
        Raises ValueError: gold is not a number.
        """
        truth = parse(f"#### {gold}")
        if truth is None:
            raise ValueError(f"the gold answer {gold!r} of example {example_id} is not a number")
        prediction = parse(completion)
        if after_examples(prompt):
            official = {
                "correct_official": same_text(extracted(STRICT, completion, 0), gold),
                "correct_flexible": same_text(extracted(FLEXIBLE, completion, -1), gold),
            }
        else:
            official = {"correct_official": parse_published(completion) == parse_published(f"#### {gold}")}
        written = None if prediction is None else str(prediction)
        correct = prediction is not None and prediction == truth
        return prediction_line(example_id, prompt, completion, gold, written, correct=correct) | official

    def summarize(self, predictions: Sequence[dict[str, Any]]) -> tuple[dict[str, float], dict[str, int]]:
        """Return (metrics, counts): each kind of accuracy that all lines have, with sqrt(p (1 - p) / n)."""
        return shares(by_kind(predictions, KINDS)), counts_of(predictions)
