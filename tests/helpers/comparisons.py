"""What the tests of comparisons share."""

import json
from pathlib import Path

from lora_one.datasets.arithmetic import generate

RATE = "model.learning_rate"


def write_problems(folder: Path, train: int, test: int) -> Path:
    """Write train.jsonl and test.jsonl with different generated problems, and return the folder."""
    rows = generate(["gain", "loss"], train, seed=0)
    others = generate(["gain", "loss"], test, seed=1, exclude={row["question"] for row in rows})
    for name, part in (("train", rows), ("test", others)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder
