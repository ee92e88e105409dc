"""MMLU: four-way multiple choice after solved examples of the same subject; the answer is the likeliest letter.

The prompt is that of the benchmark's published code, including the two spaces before the subject.
"""

import argparse
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_one.datasets.mmlu import LETTERS, ROW, read_questions
from lora_one.errors import UsageError, nearest
from lora_one.evaluation.benchmark import AnswerBenchmark
from lora_one.evaluation.decoding import Completion
from lora_one.evaluation.mmlu_subjects import CATEGORIES, SUBJECTS
from lora_one.evaluation.options import EvaluationOptions, option
from lora_one.evaluation.scoring import prediction_line
from lora_one.evaluation.shares import counts_of, shares
from lora_one.types import Example

if TYPE_CHECKING:
    from lora_one.evaluation.choices import Question
    from lora_one.evaluation.engines.protocol import Engine

HEADER = "The following are multiple choice questions (with answers) about  {subject}.\n\n"


@dataclass(frozen=True)
class Problem(Example):
    """A question (``body``) with the parts of its prompt: header, solved examples (``shots``), body."""

    header: str = ""
    shots: tuple[str, ...] = ()
    body: str = ""

    def prompt_without(self, lost: int) -> str:
        """Return the prompt without the first ``lost`` solved examples."""
        return self.header + "".join(self.shots[lost:]) + self.body


def test_questions(data_path: str | None, ntrain: int = 5) -> list[Problem]:
    """Return the test questions by subject, in the order of the files, with ids ``<subject>/<number>``.

    Source: the hub, or a folder with ``test/<subject>_test.csv`` and ``dev/<subject>_dev.csv`` (no header; question,
    four options, letter).
    Raises UsageError: another folder, or fewer than ``ntrain`` solved examples; RunError: a row has another form.
    """
    tests, solved = (read_questions(data_path, split) for split in ("test", "dev"))
    for subject in {**tests, **solved}:
        if subject not in SUBJECTS:
            raise UsageError(f"{data_path}: {subject} is not a subject of MMLU: {nearest(subject, SUBJECTS)}")
    found = []
    for subject, rows in tests.items():
        shots = solved.get(subject, [])[:ntrain]
        if len(shots) < ntrain:
            raise UsageError(
                f"--ntrain={ntrain} exceeds the number of solved examples of {subject} ({len(shots)}): pass a "
                "smaller number"
            )
        found += problems_of(subject, rows, shots)
    return found


def problems_of(subject: str, rows: Sequence[ROW], shots: Sequence[ROW]) -> list[Problem]:
    """Return the problems of a subject; shots: the rows of its solved examples."""
    header = HEADER.format(subject=subject.replace("_", " "))
    solved = tuple(f"{body_of(shot)} {shot[5]}\n\n" for shot in shots)
    problems = []
    for number, row in enumerate(rows):
        body = body_of(row)
        prompt = header + "".join(solved) + body
        parts = {"header": header, "shots": solved, "body": body}
        problems.append(Problem(prompt, f" {row[5]}", row[5], f"{subject}/{number}", **parts))
    return problems


def body_of(row: ROW) -> str:
    """Return a question with its options, up to ``Answer:``."""
    options = "".join(f"\n{letter}. {text}" for letter, text in zip(LETTERS, row[1:5], strict=True))
    return f"{row[0]}{options}\nAnswer:"


def likeliest_letters(
    engine: "Engine", examples: Sequence[Problem], done: Collection[int] = ()
) -> Iterator[tuple[int, Completion]]:
    """Yield (index, the likeliest letter), subject by subject.

    Questions of a subject with the same number of solved examples share the states of these examples.
    """
    by_subject: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        by_subject.setdefault(subject_of(example.id), []).append(index)
    for indices in by_subject.values():
        if all(index in done for index in indices):
            continue
        fitted = dict(
            zip(indices, fit(engine.tokenizer, [examples[index] for index in indices], engine.context), strict=True)
        )
        for shots in sorted({details["shots"] for _, details in fitted.values()}, reverse=True):
            group = [index for index in indices if fitted[index][1]["shots"] == shots]
            known = {place for place, index in enumerate(group) if index in done}
            questions = [fitted[index][0] for index in group]
            for place, values in engine.log_likelihoods(questions, known):
                by_letter = dict(zip(LETTERS, values, strict=True))
                best = max(by_letter, key=by_letter.get)
                details = {"log_likelihoods": by_letter, **fitted[group[place]][1]}
                yield group[place], Completion(f" {best}", details=details)


def fit(tokenizer: Any, problems: Sequence[Problem], context: int) -> list[tuple["Question", dict[str, Any]]]:
    """Return each question with as many solved examples as fit in the context, and details of what was removed.

    The first examples are removed first. A question that is too long even without examples loses its first tokens.
    """
    from lora_one.evaluation.choices import Question, questions_of

    letters = [f" {letter}" for letter in LETTERS]
    fitted: dict[int, tuple[Question, dict[str, Any]]] = {}
    for lost in range(max(len(problem.shots) for problem in problems) + 1):
        left = [place for place in range(len(problems)) if place not in fitted]
        if not left:
            break
        prompts = [problems[place].prompt_without(lost) for place in left]
        for place, prompt, question in zip(left, prompts, questions_of(tokenizer, prompts, letters), strict=True):
            details: dict[str, Any] = {"shots": len(problems[place].shots) - lost}
            if lost:
                details |= {"shots_lost": lost, "prompt": prompt}
            cut = question.length - context
            if cut <= 0:
                fitted[place] = question, details
            elif details["shots"] == 0:
                fitted[place] = Question(question.context[cut:], question.answers), details | {"tokens_cut": cut}
    return [fitted[place] for place in range(len(problems))]


def subject_of(example_id: Any) -> str:
    """Return the subject of an id ``<subject>/<number>``. Raises KeyError: no such subject."""
    subject = str(example_id).partition("/")[0]
    if subject not in SUBJECTS:
        raise KeyError(subject)
    return subject


def parts_of(example_id: Any) -> tuple[str, str, str, str]:
    """Return the metrics that a question contributes to: its subject, subcategory, category, and accuracy."""
    subject = subject_of(example_id)
    subcategory = SUBJECTS[subject]
    category = CATEGORIES[subcategory]
    return f"subject/{subject}", f"subcategory/{subcategory}", f"category/{category}", "accuracy"


@dataclass(frozen=True, kw_only=True)
class MMLUOptions(EvaluationOptions):
    """Options of MMLU."""

    max_new_tokens: int = option(
        1, help="maximum number of new tokens per completion (%(default)s)", decides="completions"
    )
    ntrain: int = option(5, help="number of solved examples before each question (%(default)s)", decides="completions")


class MMLU(AnswerBenchmark[MMLUOptions]):
    """MMLU, on its test split."""

    options = MMLUOptions

    def add_spellings(self, parser: argparse.ArgumentParser) -> None:
        """Add the model as a positional argument, as in the published script."""
        parser.add_argument(
            "model_name", nargs="?", default=argparse.SUPPRESS, metavar="model", help="the same as --model_name"
        )

    def check(self, options: MMLUOptions) -> MMLUOptions:
        """Check the options. Raises UsageError: a value out of range, or an option of generation."""
        if options.ntrain < 0:
            raise UsageError(
                f"--ntrain={options.ntrain} must be at least 0: the benchmark has 5 solved examples per subject"
            )
        unread = {"temperature": None, "top_p": None, "max_new_tokens": MMLUOptions.max_new_tokens}
        for name, default in unread.items():
            if getattr(options, name) != default:
                raise UsageError(
                    f"--{name}={getattr(options, name)} has no effect on MMLU, which compares the likelihoods of the "
                    "letters and generates no text: leave it out"
                )
        return options

    def takes_template(self, options: MMLUOptions) -> bool:
        """Return False: the answers are likelihoods of letters."""
        return False

    def examples(self, options: MMLUOptions) -> list[Problem]:
        """Return the test questions by subject."""
        return test_questions(options.data_path, options.ntrain)

    def answers(
        self, engine: "Engine", examples: Sequence[Problem], options: MMLUOptions, done: Collection[int]
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (index, the likeliest letter)."""
        return likeliest_letters(engine, examples, done)

    def score(self, example_id: Any, prompt: str, completion: str, gold: str) -> dict[str, Any]:
        """Return one line of predictions.jsonl.

        Raises KeyError: the id does not begin with a subject; ValueError: the completion is not a letter.
        """
        subject_of(example_id)
        prediction = completion.strip()
        if prediction not in tuple(LETTERS):
            raise ValueError(f"the completion {completion!r} is not one of the letters {LETTERS}")
        return prediction_line(example_id, prompt, completion, gold, prediction, correct=prediction == gold)

    def summarize(self, predictions: Sequence[dict[str, Any]]) -> tuple[dict[str, float], dict[str, int]]:
        """Return (metrics, counts): accuracy by subject, subcategory and category, and over all questions.

        All are micro-averages, with the standard error sqrt(p (1 - p) / n).
        """
        hits: dict[str, list[bool]] = {}
        for level in range(4):
            for line in predictions:
                hits.setdefault(parts_of(line["id"])[level], []).append(line["correct"])
        return shares(hits), counts_of(predictions)

    def remarks(self, predictions: Sequence[dict[str, Any]]) -> dict[str, int]:
        """Count the prompts that lost solved examples and the questions that lost tokens to fit in the context.

        Also the subjects, if --limit has left out some.
        """
        shortened = sum(line.get("shots_lost", 0) > 0 for line in predictions)
        subjects = len({subject_of(line["id"]) for line in predictions})
        found = {"prompts_shortened": shortened, "questions_cut": sum("tokens_cut" in line for line in predictions)}
        return found | ({"subjects": subjects} if subjects < len(SUBJECTS) else {})
