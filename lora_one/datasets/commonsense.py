"""The eight commonsense sets in the form that LLM-Adapters gave them: a question with its options, and a word for each.

``PROMPT`` is the published evaluation prompt, the space behind "request." included; training must use it too.
"""

from dataclasses import dataclass
from pathlib import Path

from lora_one.datasets.settings import DatasetConfig
from lora_one.datasets.sources import read_rows
from lora_one.errors import RunError, UsageError
from lora_one.types import Example

PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request. \n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
RESPONSE = "the correct answer is {word}"
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
"""Set -> the words that its answers may be, as the published extraction looks for them."""


def read_set(path: Path, name: str, split: str) -> list[Example]:
    """Examples of one set, with ids ``<name>/<number>``, from its file or folder.

    Raises RunError: a gold answer that this set does not have (the row is named).
    """
    examples = []
    for number, row in enumerate(read_rows(None, str(path), split, ["instruction", "answer"])):
        word = row["answer"]
        if word not in WORDS[name]:
            raise RunError(
                f"{path}, row {number + 1}: the answer {word!r} is none of {', '.join(WORDS[name])}, those of {name}: "
                "give the file of this set"
            )
        prompt = PROMPT.format(instruction=row["instruction"])
        examples.append(Example(prompt, RESPONSE.format(word=word), word, f"{name}/{number}"))
    return examples


def folder_of_set(data_path: Path, name: str, *, alone: bool) -> Path:
    """Where a set lies: ``<data_path>/<name>``; for a set alone its own file or folder will do.

    Raises UsageError: it does not lie there.
    """
    folder = data_path / name
    if folder.is_dir():
        return folder
    if alone and (data_path.is_file() or any(data_path.glob("test.json*"))):
        return data_path
    raise UsageError(f"{data_path} holds no folder {name} with its test.json: give --data_path=<the folder that does>")


@dataclass(frozen=True)
class CommonsenseConfig(DatasetConfig):
    def check(self) -> None:
        """Raises UsageError: no local path."""
        if self.path is None:
            raise UsageError(
                f"dataset={self.name} is not on the hub: add dataset.path=<commonsense_170k.json, or the folder of the "
                "sets with their train.json>"
            )


def train(config: CommonsenseConfig) -> list[Example]:
    """Training examples of all sets together: one file of them, or a folder whose folders hold a train.json each.

    The folders are taken in the order of their names.  Raises UsageError: there is none.
    """
    path = Path(config.path).expanduser()
    places = (
        [path] if path.is_file() else sorted(folder for folder in path.iterdir() if any(folder.glob("train.json*")))
    )
    if not places:
        raise UsageError(
            f"{path} holds no folder with a train.json: give the file commonsense_170k.json, or the folder of the sets"
        )
    rows = [
        row for place in places for row in read_rows(None, str(place), "train", ["instruction", "output", "answer"])
    ]
    return [Example(PROMPT.format(instruction=row["instruction"]), row["output"], row["answer"]) for row in rows]
