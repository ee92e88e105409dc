"""MMLU's questions: the hub's table, or the benchmark's own csv files, one for each subject, without a header."""

import csv
from pathlib import Path

from lora_one.datasets.sources import from_hub
from lora_one.errors import RunError, UsageError

SOURCE = ("cais/mmlu", "all")
LETTERS = "ABCD"
ROW = tuple[str, ...]  # question, four options, letter


def read_questions(data_path: str | None, split: str) -> dict[str, list[ROW]]:
    """Return subject -> its rows, from the hub or from ``<split>/<subject>_<split>.csv``; {}: there is no dev/.

    Raises UsageError: no test/ in the folder; RunError: a row has another form.
    """
    if data_path is None:
        found: dict[str, list[ROW]] = {}
        for row in from_hub(*SOURCE, split):
            texts = (row["question"], *row["choices"], LETTERS[row["answer"]])
            found.setdefault(row["subject"], []).append(checked(texts, f"{SOURCE[0]}, {split}"))
        return found
    folder, ending = Path(data_path).expanduser() / split, f"_{split}.csv"
    files = sorted(folder.glob(f"*{ending}"))
    if not files and split == "test":
        raise UsageError(f"{data_path} has no test/*{ending}: pass the folder with MMLU's dev/ and test/")
    return {file.name.removesuffix(ending): read_csv(file) for file in files}


def read_csv(file: Path) -> list[ROW]:
    """Return the rows of a file; every cell is text, also "None". Raises RunError: a row is not a question."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            rows = [checked(tuple(row), f"{file}, row {number}") for number, row in enumerate(csv.reader(stream), 1)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RunError(f"{file} cannot be read as csv ({error}): check the file") from error
    if not rows:
        raise RunError(f"{file} has no rows: pass a file with questions")
    return rows


def checked(row: ROW, where: str) -> ROW:
    """Return the row. Raises RunError: it does not have six cells, or the last one is not a letter."""
    if len(row) != 6 or row[5] not in tuple(LETTERS):
        raise RunError(
            f"{where}: {row!r:.80} must be a question, four options and one of the letters {LETTERS}: check the file"
        )
    return row
