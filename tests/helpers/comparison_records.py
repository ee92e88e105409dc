"""Records of comparisons that nobody ran, with known differences, for the tests of reports."""

from dataclasses import asdict

import numpy

from lora_one.reports.compare import RATE, Run, absent_row, choose, grid_points, method_row
from lora_one.reports.findings import findings

METHODS = {"rsLoRA": 0.0, "LoRA": -0.02, "LoRA-One, scaled AdamW": 0.03, "full & <free> fine_tuning": 0.0}
RATES = [1e-4, 1e-3, 1e-2]
MODEL = "0123456789abcdef" * 4


def measured(loss: float, shift: float) -> dict:
    """Return fields of a finished run."""
    course = [
        {"epoch": epoch, "loss": loss + 0.1 / (1 + epoch), "accuracy": 0.5 + 0.1 * epoch} for epoch in (0.0, 1.0, 2.0)
    ]
    return {
        "validation_loss": loss,
        "init_seconds": 2.0,
        "train_seconds": 60.0 + 100 * shift,
        "steps": 63,
        "tokens": 9_000,
        "trainable_parameters": 338_690,
        "peak_memory_bytes": 3 * 2**30,
        "git_commit": "c0ffee" * 6 + "c0ff",
        "history": tuple(course),
        "start": {"captured_energy": 0.9, "shift": 1e-3, "loss_before": 0.69, "loss_after": 0.68},
        "adapters": {"spectrum": [3.0, 1.0, 0.1 + abs(shift)], "B_angles": 45.0, "A_angles": 80.0},
        "identity": {
            "model": MODEL,
            "training examples": 2000,
            "processes": 1,
            "configuration": "a",
            "versions": {"torch": "2"},
        },
    }


def runs_of(method: str, shift: float, seeds: int, random: numpy.random.Generator) -> list[Run]:
    """Return the tuning, final and start runs of a method; the middle rate is the best one."""
    found = [
        Run(
            method,
            "tuning",
            {RATE: rate},
            1,
            f"runs/{method}/{rate:g}/1",
            **measured(0.5 - shift + abs(place - 1) * 0.1, shift),
        )
        for place, rate in enumerate(RATES)
    ]
    for seed in range(11, 11 + seeds):
        accuracy = 0.7 + 0.002 * (seed - 11) + shift + random.normal(0, 0.001)
        score = {"value": accuracy, "metric": "accuracy", "predictions": None, "answers": 400, "unparsed": 4, "cut": 0}
        place = f"runs/{method}/{RATES[1]:g}/{seed}"
        found.append(
            Run(
                method,
                "final",
                {RATE: RATES[1]},
                seed,
                place,
                test_loss=1 - accuracy,
                scores={"accuracy": score},
                **measured(0.5 - shift, shift),
            )
        )
        untrained = {"accuracy": score | {"value": 0.5}}
        found.append(
            Run(
                method,
                "start",
                {RATE: RATES[1]},
                seed,
                place + "s",
                test_loss=0.69,
                scores=untrained,
                **measured(0.69, 0),
            )
        )
    return found


def record(title: str = "Four methods", seeds: int = 5, baseline: str | None = "rsLoRA") -> dict:
    """Return the content of a comparison.json: four methods, one of which failed once, and one that was not run."""
    random = numpy.random.default_rng(0)
    points, runs, rows = grid_points({RATE: RATES}), [], []
    for method, shift in METHODS.items():
        done = runs_of(method, shift, seeds, random)
        tuning = [run for run in done if run.stage == "tuning"]
        if method == "LoRA":
            done.append(Run(method, "final", {RATE: RATES[1]}, 99, "runs/failed", "the loss became nan"))
        rows.append(method_row(method, done, choose(points, tuning), points, 0.7, ["accuracy"]))
        runs += done
    rows.append(absent_row("CorDA", "attrs is not installed"))
    return {
        "title": title,
        "command": "lora-one-compare file.yaml",
        "date": "2026-11-27T12:00:00+00:00",
        "machine": "a CPU, 1 of 2 cores, on cpu",
        "versions": {"python": "3.11", "torch": "2.13.0"},
        "git_commit": None,
        "comparison": {
            "evaluations": {"accuracy": {"benchmark": "glue"}},
            "baseline": baseline,
            "tuning_seeds": [1],
            "seeds": list(range(11, 11 + seeds)),
            "unequal_budgets": None,
        },
        "test": {"counts": {"examples": 400, "tokens": 400}},
        "uneven": [],
        "rows": rows,
        "findings": findings(runs, baseline, ["accuracy"]) if baseline else [],
        "runs": [asdict(run) for run in runs],
    }


# what differs between two equal comparisons: times, memory, dates, how they were started, and where
TIMES = {"date", "command", "machine", "git_commit", "init_seconds", "train_seconds", "peak_memory_bytes"}
TIMES |= {f"init_seconds_{part}" for part in ("mean", "sd")}


def without(value, names=TIMES):
    """Return the content of a comparison.json without the entries of these names."""
    if isinstance(value, dict):
        return {key: without(part, names) for key, part in value.items() if key not in names}
    return [without(part, names) for part in value] if isinstance(value, list) else value
