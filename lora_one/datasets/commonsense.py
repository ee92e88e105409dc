"""The eight commonsense sets in the form of LLM-Adapters: a question with its options, answered by one word.

``PROMPT`` is that of LoRA-One's training and evaluation (LLM-Adapters has a space after "request.").
"""

import re
from dataclasses import dataclass
from pathlib import Path

from lora_one.datasets.settings import DatasetConfig
from lora_one.datasets.sources import read_rows
from lora_one.errors import RunError, UsageError
from lora_one.types import Example

PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
RESPONSE = "the correct answer is {word}"
INSTRUCTION = re.compile(r"Please (?:answer|choose) the [^:]*: (.*?)(?:\n\n|\Z)", re.DOTALL)
ANSWERS = tuple(f"answer{number}" for number in range(1, 6))
WORDS = {
    "boolq": ("true", "false"),
    "piqa": ("solution1", "solution2"),
    "social_i_qa": ANSWERS,
    "hellaswag": ("ending1", "ending2", "ending3", "ending4"),
    "winogrande": ("option1", "option2"),
    "ARC-Easy": ANSWERS,
    "ARC-Challenge": ANSWERS,
    "openbookqa": ANSWERS,
}
"""Set -> its possible answers: the words that the published extraction searches for."""


def read_set(path: Path, name: str, split: str) -> list[Example]:
    """Return the examples of one set, with ids ``<name>/<number>``, from its file or folder.

    Raises RunError: a gold answer is not one of the set's words (the row is named).
    """
    examples = []
    for number, row in enumerate(read_rows(None, str(path), split, ["instruction", "answer"])):
        word = row["answer"]
        if word not in WORDS[name]:
            raise RunError(
                f"{path}, row {number + 1}: the answer {word!r} is not an answer of {name} "
                f"({', '.join(WORDS[name])}): pass the file of this set"
            )
        prompt = PROMPT.format(instruction=row["instruction"])
        examples.append(Example(prompt, RESPONSE.format(word=word), word, f"{name}/{number}"))
    return examples


def question_in(instruction: str) -> str:
    """Return the question of an instruction, without the opening and the options; other texts are returned unchanged.

    >>> question_in("Please answer the following question, question: is it?\\n\\nAnswer format: true/false")
    'is it?'
    """
    found = INSTRUCTION.match(instruction)
    return found[1] if found else instruction


def folder_of_set(data_path: Path, name: str, *, alone: bool) -> Path:
    """Return the folder of a set, ``<data_path>/<name>``, or ``data_path`` itself if it is the only set.

    Raises UsageError: there is no such folder.
    """
    folder = data_path / name
    if folder.is_dir():
        return folder
    if alone and (data_path.is_file() or any(data_path.glob("test.json*"))):
        return data_path
    raise UsageError(
        f"{data_path} has no folder {name} with a test.json: pass --data_path=<the folder that contains it>"
    )


@dataclass(frozen=True)
class CommonsenseConfig(DatasetConfig):
    def check(self) -> None:
        """Check that a local path is set. Raises UsageError: there is none."""
        if self.path is None:
            raise UsageError(
                f"dataset={self.name} is not on the hub: add dataset.path=<commonsense_170k.json, or a folder with a "
                "subfolder for each set and a train.json in each>"
            )


def train(config: CommonsenseConfig) -> list[Example]:
    """Return the training examples of all sets, from one file or from the train.json of each subfolder.

    The subfolders are read in the order of their names.  Raises UsageError: there is none.
    """
    path = Path(config.path).expanduser()
    places = (
        [path] if path.is_file() else sorted(folder for folder in path.iterdir() if any(folder.glob("train.json*")))
    )
    if not places:
        raise UsageError(
            f"{path} has no subfolder with a train.json: pass the file commonsense_170k.json, or a folder with a "
            "subfolder for each set"
        )
    rows = [
        row for place in places for row in read_rows(None, str(place), "train", ["instruction", "output", "answer"])
    ]
    return [Example(PROMPT.format(instruction=row["instruction"]), row["output"], row["answer"]) for row in rows]
