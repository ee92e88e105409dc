"""The part ``gemma`` of gpu.py: LoRA, LoRA-One and LoRA-GA on Gemma 3 270M and GSM8K, by learning rate and seed.

``gemma:2/6`` trains the second sixth of the runs. ``gemma`` without a slice trains all remaining runs, then evaluates
each method on all test problems with the learning rate of the lowest mean validation loss. The runs are those of
run_exp.py, in FOLDER/runs; finished runs are not run again.
"""

import argparse
import json
import math
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from rows import Row, Table

from lora_one.datasets.arithmetic import PRETRAIN_FAMILIES, generate
from lora_one.evaluation.command import main as evaluate
from lora_one.models import BUNDLED
from lora_one.runs.composition import compose
from lora_one.runs.experiment import execute

METHODS = {
    "LoRA": ["init=default"],
    "LoRA-One": ["init=gradient", "init.direction=LoRA-One"],
    "LoRA-GA": ["init=gradient", "init.direction=LoRA-GA"],
}
RATES, SEEDS = (1e-4, 2e-4, 5e-4, 1e-3), (0, 1, 2)
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Work:
    """Overrides of every run, the model, the test file, and the options of the evaluation."""

    overrides: list[str]
    model: str
    test: Path
    options: list[str]
    rates: tuple[float, ...]
    seeds: tuple[int, ...]


def main(chosen: argparse.Namespace, slice_: str) -> int:
    work = small(chosen.out) if chosen.small else whole(chosen)
    if isinstance(work, str):
        print(work, file=sys.stderr)
        return 2
    number, count = map(int, slice_.split("/")) if slice_ else (1, 1)
    if not 1 <= number <= count:
        print(f"gemma:{slice_} is not a valid slice: use 1/{count} to {count}/{count}", file=sys.stderr)
        return 2
    name = f"gemma-{number}of{count}" if slice_ else "gemma"
    settings = {"model": Path(work.model).name, "rates": list(work.rates), "seeds": list(work.seeds)}
    table = Table(chosen.out, name, chosen.device, settings, chosen.seconds)
    jobs = [(method, rate, seed) for seed in work.seeds for method in METHODS for rate in work.rates]
    for method, rate, seed in jobs[number - 1 :: count]:
        table.row(named(method, rate, seed), partial(trained, work, chosen.out, method, rate, seed))
    if not slice_ and not table.left:
        scored(table, work)
    return int(any("error" in row for row in table.rows))


def whole(chosen: argparse.Namespace) -> Work | str:
    """Return the real model and data, or an error message if they are missing."""
    model = chosen.model or Path(os.environ.get("REAL_MODELS", "")) / "gemma-3-270m-hf"
    data = (chosen.data or ROOT.parent / "shared/data") / "gsm8k"
    for path, way in ((model / "config.json", "--model FOLDER or REAL_MODELS"), (data / "test.jsonl", "--data FOLDER")):
        if not path.exists():
            return f"gemma: {path} does not exist: set {way}"
    overrides = ["dataset=gsm8k", f"dataset.path={data}", "model=llama", f"model.name={model}", "model.max_length=512"]
    overrides += ["dataset.accuracy_examples=0", "model.per_device_batch_size=16", "model.bf16=true"]
    return Work(overrides, str(model), data / "test.jsonl", ["--max_new_tokens=320"], RATES, SEEDS)


def small(out: Path) -> Work:
    """Return the bundled model and generated problems."""
    out.mkdir(parents=True, exist_ok=True)
    test = out / "generated_test.jsonl"
    rows = generate(PRETRAIN_FAMILIES, 8, 1)
    test.write_text("".join(json.dumps({"question": row["question"], "answer": row["answer"]}) + "\n" for row in rows))
    overrides = ["dataset=arithmetic", "dataset.train_size=48", "dataset.validation_size=8", "model=tiny"]
    overrides += ["dataset.accuracy_examples=0", "model.real_batch_size=8", "model.per_device_batch_size=8"]
    return Work(overrides, str(BUNDLED / "tiny"), test, ["--max_new_tokens=8"], (1e-3, 2e-3), (0, 1))


def named(method: str, rate: float, seed: int) -> str:
    return f"{method}, learning rate {rate:g}, seed {seed}"


def trained(work: Work, out: Path, method: str, rate: float, seed: int) -> Row:
    """Do one run; return the results in its run.json."""
    overrides = [*work.overrides, *METHODS[method], f"model.learning_rate={rate}", f"seed={seed}"]
    overrides += [f"results_dir={out / 'runs'}", "dataset.cache=null", "wandb.mode=disabled"]
    folder = execute(compose(overrides))
    record = folder.read()
    init = record["init"]
    row = {"method": method, "rate": rate, "seed": seed, "adapter": str(folder.adapter)}
    row |= {"validation_loss": record["evaluation"]["final"]["eval_loss"], "seconds": record["train"]["seconds"]}
    row |= {"init_seconds": init["seconds"], "init_loss_before": init.get("loss_before")}
    return row | {"init_loss_after": init.get("loss_after"), "steps": record["train"]["steps"]}


def scored(table: Table, work: Work) -> None:
    """Evaluate each method's best learning rate on the test problems, for every seed, and the pretrained model."""
    table.row("test, pretrained", partial(accuracy, work, None, table.file.parent / "eval/pretrained"))
    best = {}
    for method in METHODS:
        rows = [row for row in table.rows if row.get("method") == method and row.get("adapter")]
        if len(rows) < len(work.rates) * len(work.seeds):
            continue
        losses = {rate: mean(row["validation_loss"] for row in rows if row["rate"] == rate) for rate in work.rates}
        best[method] = min(losses, key=losses.get)
        for row in (row for row in rows if row["rate"] == best[method]):
            output = Path(row["adapter"]).parent / "eval/gsm8k"
            table.row(f"test, {row['name']}", partial(accuracy, work, row["adapter"], output))
    table.write(best_learning_rates=best)


def accuracy(work: Work, adapter: str | None, output: Path) -> Row:
    """Return the exact match on the test problems, greedy decoding, with its Wilson interval."""
    arguments = [f"--model_name={work.model}", f"--data_path={work.test}", f"--output_dir={output}", *work.options]
    arguments += [f"--adapter={adapter}"] if adapter else []
    if evaluate("gsm8k", arguments) != 0:
        raise RuntimeError("the evaluation failed: see its message above")
    counts: dict[str, Any] = json.loads((output / "metrics.json").read_text())["counts"]
    share = counts["correct"] / counts["total"]
    low, high = wilson(counts["correct"], counts["total"])
    return {"accuracy": share, "interval": f"{low:.1%} to {high:.1%}", "counts": counts}


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Return the confidence interval of a share (Wilson, 1927).

    >>> [round(end, 3) for end in wilson(5, 100)]
    [0.022, 0.112]
    """
    share = successes / trials
    middle = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    return max(0.0, middle - half), min(1.0, middle + half)
