"""Small data sets, in files and in place of the hub."""

import gzip
import json

from datasets import Dataset

from lora_one.datasets import sources
from tests.helpers.runs import run_config


def write_jsonl(path, rows):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def dataset_for(*overrides):
    return run_config("model=tiny", *overrides).dataset


def qa_rows(count):
    return [{"question": f"How many is {i}?", "answer": f"It is {i}.\n#### {i}", "extra": i} for i in range(count)]


def named_dataset(name, *overrides):
    return run_config("model=tiny", f"dataset={name}", *overrides).dataset


def hub_of(monkeypatch, rows):
    """The hub holds these rows, by split; which split was asked for is noted."""
    asked = []

    def from_hub(name, subset, split, first=None):
        asked.append((name, subset, split))
        return Dataset.from_list(rows[split][:first])

    monkeypatch.setattr(sources, "from_hub", from_hub)
    return asked


ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd.\n\n### Response:\n"
)
