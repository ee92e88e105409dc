"""Folders of finished runs for `bench_sweeps.py`: copies of one real run, with other methods, rates and seeds."""

import dataclasses
import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from lora_one.records.folder import RunFolder, folder_of, locate
from lora_one.records.provenance import config_hash
from lora_one.runs.composition import compose
from lora_one.runs.experiment import execute

THREE_STEPS = (
    "model.name=bundled/tiny",
    "dataset.train_size=24",
    "dataset.validation_size=8",
    "dataset.accuracy_examples=0",
    "model.real_batch_size=8",
    "model.per_device_batch_size=8",
    "wandb.mode=disabled",
)
METHODS = ("lora_one", "lora_ga", "lora", "pissa", "olora")
QUESTIONS = 200  # of the evaluation that each run has


@dataclass(frozen=True)
class Grid:
    """A sweep: its methods, the numbers of its learning rates and of its seeds."""

    rates: int
    seeds: int
    methods: Sequence[str] = METHODS

    @classmethod
    def of(cls, jobs: int, seeds: int = 10) -> "Grid":
        """Return a sweep of this number of jobs, a multiple of the methods times the seeds."""
        rates, rest = divmod(jobs, len(METHODS) * seeds)
        if rest:
            raise SystemExit(f"{jobs} jobs are not divisible by {len(METHODS)} methods x {seeds} seeds")
        return cls(rates, seeds)

    @property
    def learning_rates(self) -> list[float]:
        return [float(f"{1e-5 * 1.01**place:.6g}") for place in range(self.rates)]

    def arguments(self, results: Path) -> list[str]:
        """Return the arguments of run_exp.py for this sweep."""
        values = {
            "init": self.methods,
            "model.learning_rate": map(str, self.learning_rates),
            "seed": map(str, range(self.seeds)),
        }
        swept = [f"{key}={','.join(choices)}" for key, choices in values.items()]
        return ["-m", *swept, *THREE_STEPS, f"results_dir={results}"]


def real_run(results: Path) -> RunFolder:
    """Train for three steps; return the run."""
    return execute(compose([*THREE_STEPS, "init=lora_one", "seed=0", f"results_dir={results}"]))


def written(grid: Grid, results: Path, model: RunFolder, *, evaluated: bool = False) -> list[RunFolder]:
    """Write the finished runs of a sweep, with run.json and metrics.jsonl; return their folders.

    model: a real run.  evaluated: each run also has an evaluation with answers to QUESTIONS questions.
    """
    draw, template = random.Random(0), model.read()
    answers = predictions(results.parent / "predictions.jsonl", draw) if evaluated else None
    folders = []
    for run in runs_of(grid, results):
        config = run.published()
        digest = config_hash(config, template["provenance"]["fingerprints"])
        folder = RunFolder(folder_of(run, digest))
        folder.path.mkdir(parents=True)
        final = {"eval_loss": draw.gauss(0.4 - run.model.learning_rate, 0.01)}
        record = template | {"config": config, "config_hash": digest}
        record |= {"evaluation": template["evaluation"] | {"final": template["evaluation"]["final"] | final}}
        folder.run_json.write_text(json.dumps(record, indent=2))
        os.link(model.metrics, folder.metrics)
        if answers is not None:
            evaluate(folder, answers)
        folders.append(folder)
    return folders


def runs_of(grid: Grid, results: Path) -> Iterator[Any]:
    """Yield the configuration of each job."""
    for method in grid.methods:
        first = locate(compose([*THREE_STEPS, f"init={method}", f"results_dir={results}"])).run
        for rate, seed in product(grid.learning_rates, range(grid.seeds)):
            yield dataclasses.replace(first, seed=seed, model=dataclasses.replace(first.model, learning_rate=rate))


def predictions(path: Path, draw: random.Random) -> Path:
    """Write the answers of an evaluation, which all runs share as one file on the disk."""
    lines = [
        {"id": f"gsm8k/{place}", "prompt": "q" * 200, "completion": "a" * 300, "correct": draw.random() < 0.6}
        for place in range(QUESTIONS)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def evaluate(folder: RunFolder, answers: Path) -> None:
    """Write the folder of an evaluation."""
    place = folder.path / "eval" / "gsm8k"
    place.mkdir(parents=True)
    hits = correct_in(answers)
    counts = {"correct": hits, "wrong": QUESTIONS - hits, "unparsed": 0, "total": QUESTIONS}
    report = {"task": "gsm8k", "metrics": {"accuracy": hits / QUESTIONS}, "counts": counts, "remarks": {"cut_off": 0}}
    (place / "metrics.json").write_text(json.dumps(report))
    os.link(answers, place / "predictions.jsonl")


@cache
def correct_in(answers: Path) -> int:
    return sum(json.loads(line)["correct"] for line in answers.read_text().splitlines())
