"""Made-up questions for `bench_eval.py`, as long as those of the real benchmarks: MMLU, commonsense, HumanEval."""

import random
from collections.abc import Iterator

from lora_one.datasets.commonsense import PROMPT, RESPONSE, WORDS
from lora_one.evaluation import humaneval, mmlu
from lora_one.types import Example

SEED, NTRAIN = 0, 5
# mean numbers of characters in MMLU's test set: of a question, an option, and five solved questions
QUESTION, OPTION, SHOTS = 275, 42, 2472
# set of commonsense -> opening of its instructions, name of its options, mean number of characters of an instruction
SETS = {
    "boolq": ("Please answer the following question with true or false, question: ", None, 138),
    "piqa": ("Please choose the correct solution to the question: ", "Solution", 347),
    "social_i_qa": ("Please choose the correct answer to the question: ", "Answer", 288),
    "hellaswag": ("Please choose the correct ending to complete the given sentence: ", "Ending", 921),
    "winogrande": (
        "Please choose the correct answer to fill in the blank to complete the given sentence: ",
        "Option",
        251,
    ),
    "ARC-Easy": ("Please choose the correct answer to the question: ", "Answer", 343),
    "ARC-Challenge": ("Please choose the correct answer to the question: ", "Answer", 387),
    "openbookqa": ("Please choose the correct answer to the question: ", "Answer", 261),
}
OPTIONS = {"social_i_qa": 3, "ARC-Easy": 4, "ARC-Challenge": 4, "openbookqa": 4}  # of five possible ones
PROBLEM = 451  # mean number of characters of HumanEval's problems


class Texts:
    """Pseudo-words and texts of them, from one stream of random numbers."""

    def __init__(self) -> None:
        self.rng = random.Random(SEED)
        self.words = ["".join(self.rng.choices("aeioulnrst", k=self.rng.randint(2, 9))) for _ in range(2000)]

    def text(self, size: float) -> str:
        """Return words with at least ``size`` characters."""
        found = self.rng.choice(self.words)
        while len(found) < size:
            found += " " + self.rng.choice(self.words)
        return found


def mmlu_problems(subjects: int, questions: int) -> list[mmlu.Problem]:
    """Return 5-shot questions for the first subjects of MMLU."""
    made = Texts()

    def row(size: float) -> mmlu.ROW:
        """Return a question of ``size`` times the mean length."""
        options = (made.text(size * OPTION) for _ in mmlu.LETTERS)
        return (made.text(size * QUESTION), *options, made.rng.choice(mmlu.LETTERS))

    problems = []
    for subject in list(mmlu.SUBJECTS)[:subjects]:
        shots = [row(SHOTS / NTRAIN / (QUESTION + 4 * OPTION)) for _ in range(NTRAIN)]
        problems += mmlu.problems_of(subject, [row(made.rng.uniform(0.5, 1.5)) for _ in range(questions)], shots)
    return problems


def commonsense_examples(rows: int) -> list[Example]:
    """Return ``rows`` examples of each of the eight sets, in the form of their files."""
    made = Texts()
    return [example for name in SETS for example in commonsense_set(name, rows, made)]


def commonsense_set(name: str, rows: int, made: Texts) -> Iterator[Example]:
    """Yield examples of one set; half of the made-up text is the question, the rest is shared by the options."""
    opening, option, length = SETS[name]
    words = WORDS[name][: OPTIONS.get(name)]
    ending = f"\n\nAnswer format: {'/'.join(words)}"
    labels = [f"{option}{place}: " for place in range(1, len(words) + 1)] if option else []
    frame = len(opening + ending + " ".join(labels)) + 4 * (len(labels) + 1)  # a text is about 3 longer than asked for
    for number in range(rows):
        size = made.rng.uniform(0.5, 1.5) * (length - frame)
        question = made.text(size / 2 if labels else size)
        options = " ".join(label + made.text(size / 2 / len(words)) for label in labels)
        instruction = f"{opening}{question}?" + (f"\n\n{options}" if labels else "") + ending
        word = made.rng.choice(words)
        yield Example(PROMPT.format(instruction=instruction), RESPONSE.format(word=word), word, f"{name}/{number}")


def humaneval_prompts(problems: int) -> list[str]:
    """Return prompts of HumanEval: a function's name, its docstring and an example, in the published template."""
    made = Texts()
    prompts = []
    for _ in range(problems):
        name = "_".join(made.rng.choices(made.words, k=2))
        described = made.text(made.rng.uniform(0.5, 1.5) * (PROBLEM - 150))
        problem = (
            "from typing import List\n\n\n"
            f"def {name}(numbers: List[float], threshold: float) -> bool:\n"
            f'    """ {described}\n    >>> {name}([1.0, 2.0, 3.0], 0.5)\n    False\n    """\n'
        )
        prompts.append(humaneval.PROMPT.format(problem=problem))
    return prompts
