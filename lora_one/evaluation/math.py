"""MATH: competition problems whose answer is in the last ``\\boxed{}``, or after "The answer is: ".

Protocol of the published script (arXiv:2411.19557): its prompt, greedy decoding, 512 new tokens, stop words.
``accuracy`` counts answers that are mathematically equal (math-verify). ``accuracy_official`` counts as that script
does: answers after "The answer is: " alone, compared by ``equal_as_published`` after the data set's normalisation.
"""

import importlib.util
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_one.datasets.questions import MATH as HUB
from lora_one.datasets.questions import MATH_SUBJECTS as SUBJECTS
from lora_one.datasets.sources import as_text, read_rows
from lora_one.errors import RunError, UsageError
from lora_one.evaluation.benchmark import Benchmark, Prediction
from lora_one.evaluation.equality import Comparison, compared, equal
from lora_one.evaluation.options import EvaluationOptions, option
from lora_one.evaluation.published_equality import equal_as_published
from lora_one.evaluation.sandbox import cores
from lora_one.evaluation.scoring import prediction_line
from lora_one.evaluation.shares import counts_of, shares
from lora_one.progress import progress
from lora_one.types import Example

COLUMNS, GROUPS = ("problem", "solution"), ("level", "type")
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{problem}\n\n### Response: Let's think step by step."
)
STOP_WORDS = re.compile("Instruction|Response")  # the published list also has them with a colon
BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])")
RESULTS = {True: "equal", False: "different", None: "undecided"}


def problems(data_path: str | None) -> list[Example]:
    """Return the test problems, from the hub or a local file or folder; ``gold``: answer, level and type.

    Raises RunError: a solution has no boxed answer (the row is named).
    """
    found = []
    for number, row in enumerate(problem_rows(data_path), start=1):
        answer = last_boxed(row["solution"])
        if not answer:
            raise RunError(
                f"row {number}: the solution has no \\boxed answer (it ends in {row['solution'][-60:]!r}): check the "
                "file"
            )
        gold = {"answer": answer} | {name: row[name] for name in GROUPS if row.get(name)}
        found.append(Example(PROMPT.format(problem=row["problem"]), row["solution"], gold))
    return found


def problem_rows(data_path: str | None) -> list[dict[str, str]]:
    """Return the rows of the test split: of the hub, a file, a folder, or a folder with one subfolder per subject."""
    if data_path is None:  # the hub has one configuration per subject; not run yet
        return [row for name in SUBJECTS for row in read_rows((HUB, name), None, "test", COLUMNS, optional=GROUPS)]
    place = Path(data_path).expanduser()
    place = place / "test" if (place / "test").is_dir() else place
    folders = [place / name for name in SUBJECTS if (place / name).is_dir()]
    if not folders:
        return read_rows(None, str(place), "test", COLUMNS, optional=GROUPS)
    return [row for folder in folders for row in subject_rows(folder)]


def subject_rows(folder: Path) -> list[dict[str, str]]:
    """Return the problems of a subject from its files ``<number>.json``, in the order of the numbers.

    Without such files, the folder must be a copy of the hub's, whose test split is read.
    Raises RunError: a file is not a problem.
    """
    files = sorted((file for file in folder.glob("*.json") if file.stem.isdecimal()), key=lambda file: int(file.stem))
    if not files:
        return read_rows(None, str(folder), "test", COLUMNS, optional=GROUPS)
    rows = []
    for file in files:
        try:
            row = json.loads(file.read_text(encoding="utf-8"))
            kept = {name: as_text(row[name], name, str(file)) for name in (*COLUMNS, *GROUPS) if name in row}
            rows.append({name: kept.pop(name) for name in COLUMNS} | kept)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{file} is not a problem ({error!r}); required are {', '.join(COLUMNS)}: check the file"
            ) from error
    return rows


def parse(completion: str) -> str | None:
    """Return the last boxed answer before the first stop word, or else ``stated``; None: unparsed.

    >>> parse(r"First \\boxed{1}, so \\boxed{\\frac{1}{2}}. ### Instruction: \\boxed{3}"), parse("2")
    ('\\\\frac{1}{2}', None)
    """
    return last_boxed(STOP_WORDS.split(completion, maxsplit=1)[0]) or stated(completion)


def stated(completion: str) -> str | None:
    """Return what follows the last "The answer is: ", as in MetaMathQA, up to a full stop at the end of a line.

    >>> stated("2+3 is 5. The answer is: 5"), stated("The answer is: 1.5.\\nSo it ends."), stated(r"\\boxed{5}")
    ('5', '1.5', None)
    """
    _, marker, rest = STOP_WORDS.split(completion, maxsplit=1)[0].rpartition("The answer is: ")
    return rest.split(".\n")[0].strip().removesuffix(".").strip() or None if marker else None


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last ``\boxed{...}`` or ``\fbox{...}``.

    After ``\boxed 5`` without braces, the content ends before $ or at the end of the line. Escaped braces are ignored.
    None: there is no box, or the last one is not closed.
    """
    boxes = list(BOX.finditer(text))
    if not boxes:
        return None
    rest = text[boxes[-1].end() :]
    if not rest.lstrip().startswith("{"):
        return re.split(r"[$\n]", rest, maxsplit=1)[0].strip().removesuffix(".")
    depth = 0
    for brace in re.finditer(r"\\.|[{}]", rest, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0 and brace[0] == "}":
            return rest[rest.index("{") + 1 : brace.start()].strip()
    return None


def normalized(answer: str) -> str:
    r"""Return the answer in the form in which the data set's comparison (``is_equiv``) compares it.

    Removed are spaces, ``\!``, ``\left``, ``\right``, signs of degrees, dollars and percent, a unit after ``\text{ ``,
    and a short ``x =`` at the start. ``.5`` becomes ``0.5`` and ``\dfrac`` becomes ``\frac``; ``\frac12``, ``1/2`` and
    ``0.5`` become ``\frac{1}{2}``.

    >>> normalized(r"x = \dfrac12"), normalized(r"90^\circ"), normalized(r"2\sqrt3\text{ cm}")
    ('\\frac{1}{2}', '90', '2\\sqrt{3}')
    """
    text = answer.replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
    text = text.replace("tfrac", "frac").replace("dfrac", "frac").replace("\\left", "").replace("\\right", "")
    text = re.sub(r"\^\\circ|\^\{\\circ\}|\\\$|\\%", "", text)
    before, unit, _ = text.rpartition("\\text{ ")
    text = before if unit else text
    text = re.sub(r"(^|[ {])\.", r"\g<1>0.", text)
    left, equals, right = text.partition("=")
    if equals and "=" not in right and len(left) <= 2:
        text = right
    text = re.sub(r"\\sqrt([^{\[])", r"\\sqrt{\1}", text.strip()).replace(" ", "")
    text = re.sub(
        r"\\frac([^{])(\{|[^{])", lambda m: rf"\frac{{{m[1]}}}" + (m[2] if m[2] == "{" else f"{{{m[2]}}}"), text
    )
    text = re.sub(r"^(-?\d+)/(-?\d+)$", r"\\frac{\1}{\2}", text)
    return r"\frac{1}{2}" if text == "0.5" else text


@dataclass(frozen=True, kw_only=True)
class MathOptions(EvaluationOptions):
    """Options of MATH."""

    timeout: float = option(
        10, type=float, help="time limit for comparing two answers, in seconds (%(default)s)", decides="score"
    )
    workers: int = option(cores(), help="comparisons that run at a time (default: one per core, %(default)s)")


class Math(Benchmark[MathOptions]):
    """MATH, on its test split."""

    options = MathOptions

    def check(self, options: MathOptions) -> MathOptions:
        """Check the options. Raises UsageError: a value out of range, or math-verify is not installed."""
        if not 0 < options.timeout <= 3600:
            raise UsageError(
                f"--timeout={options.timeout} must be greater than 0 and at most 3600 seconds: the default is 10"
            )
        if options.workers < 1:
            raise UsageError(
                f"--workers={options.workers} must be at least 1: pass a larger number, or leave it out for one per "
                "core"
            )
        if importlib.util.find_spec("math_verify") is None:
            raise UsageError("scoring MATH needs math-verify, which is not installed: pip install 'lora-one[math]'")
        return options

    def examples(self, options: MathOptions) -> list[Example]:
        """Return the test problems."""
        return problems(options.data_path)

    def score(self, example_id: Any, prompt: str, completion: str, gold: dict[str, str]) -> dict[str, Any]:
        """Return one line of predictions.jsonl; both scores are None until judge has compared the answers.

        Raises KeyError, TypeError, AttributeError: gold has no answer, or one that is not text.
        """
        normalized(gold["answer"])  # raises what is documented above, before the answers are compared
        line = prediction_line(example_id, prompt, completion, gold, parse(completion), correct=None)
        return line | {"correct_official": None}

    def judge(self, predictions: Sequence[Prediction], options: MathOptions, output: Path) -> list[Prediction]:
        """Compare the answers, fill in both scores and ``result`` (equal, different, undecided, unparsed)."""
        judged = [line | {"correct": False, "result": "unparsed", "correct_official": False} for line in predictions]
        asked: list[tuple[dict[str, Any], str, Comparison]] = []  # the line, the score to fill in, its comparison
        for line in judged:
            gold = line["gold"]["answer"]
            if line["prediction"] is not None:
                asked.append((line, "correct", (equal, gold, line["prediction"])))
            official = stated(line["completion"])
            if official is not None:
                one, other = normalized(gold), normalized(official)
                line["correct_official"] = one == other
                if one != other:
                    asked.append((line, "correct_official", (equal_as_published, one, other)))
        comparisons = [comparison for *_, comparison in asked]
        with progress("comparison of answers", len(asked), "comparisons") as shown:
            for index, outcome in compared(comparisons, options.timeout, options.workers):
                line, name, _ = asked[index]
                line |= {name: outcome is True} | ({"result": RESULTS[outcome]} if name == "correct" else {})
                shown.advance()
        return judged

    def summarize(self, predictions: Sequence[dict[str, Any]]) -> tuple[dict[str, float], dict[str, int]]:
        """Return (metrics, counts): both accuracies over all problems; accuracy also by level and subject, if known.

        Standard errors are sqrt(p (1 - p) / n).
        """
        hits: dict[str, list[bool]] = {}
        for column in GROUPS:
            groups = {line["gold"][column] for line in predictions if column in line["gold"]}
            for group in sorted(groups):
                hits[f"accuracy/{group}"] = [
                    line["correct"] for line in predictions if line["gold"].get(column) == group
                ]
        hits["accuracy"] = [line["correct"] for line in predictions]
        hits["accuracy_official"] = [line["correct_official"] for line in predictions]
        return shares(hits), counts_of(predictions)

    def remarks(self, predictions: Sequence[dict[str, Any]]) -> dict[str, int]:
        """Count answers wrong because their comparison exceeded the time limit; and the subjects, if some are missing.

        Without "The answer is: " in any completion, ``accuracy_official`` is 0 whatever the answers: unmarked counts
        the completions then.
        """
        subjects = {line["gold"]["type"] for line in predictions if "type" in line["gold"]}
        found = {"undecided": sum(line["result"] == "undecided" for line in predictions)}
        found |= {"subjects": len(subjects)} if subjects and len(subjects) < len(SUBJECTS) else {}
        unmarked = all(stated(line["completion"]) is None for line in predictions)
        return found | ({"unmarked": len(predictions)} if unmarked else {})
