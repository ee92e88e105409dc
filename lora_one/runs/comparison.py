"""Methods compared by ordinary runs: each method's grid with the tuning seeds, its best point with every seed.

The best point is that of the lowest validation loss. What is reported is the loss on a split apart, which only the
adapters of the chosen points ever see: before the adapters, at their start (the same run with model.epochs=0) and
after training. A run that is finished is taken as it is, so that a comparison goes on where it was stopped.
"""

import gc
import os
import platform
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lora_one.config import RunConfig, refuse_unknown
from lora_one.config.rules import flatten
from lora_one.data import load_dataset
from lora_one.data.encode import encoder_for
from lora_one.errors import RunError, UsageError, nearest
from lora_one.evaluation.held_out import HeldOut
from lora_one.files import write_json
from lora_one.models import device
from lora_one.records.folder import RunFolder, placed
from lora_one.records.provenance import git_commit, versions
from lora_one.reports import compare as table
from lora_one.reports.compare import Grid, Point, Run

Compose = Callable[[Sequence[str]], RunConfig]
Execute = Callable[[RunConfig], None]

# what a method or a grid may not change, beside the data: the work and how it is judged
SAME = {"seed", "results_dir", "overwrite", "dry_run"} | {
    f"model.{key}"
    for key in (
        "name",
        "type",
        "revision",
        "bf16",
        "epochs",
        "real_batch_size",
        "max_length",
        "loss",
        "eval_epochs",
        "early_stopping_patience",
    )
}


@dataclass(frozen=True)
class Comparison:
    """A comparison file. Overrides are those of run_exp.py; of two for one key the later counts."""

    title: str
    common: list[str]  # overrides of every run
    test: list[str]  # overrides, after the common ones, that give the data of the reported loss
    test_examples: int  # the first so many of them
    tuning_seeds: list[int]
    seeds: list[int]
    grid: dict[str, list[float]]  # key -> values, of every method
    methods: dict[str, list[str]]  # name -> overrides
    own_grid: dict[str, dict[str, list[float]]] = field(default_factory=dict)  # by method: other values, further keys
    not_run: dict[str, str] = field(default_factory=dict)  # name -> why it cannot run here
    seconds_per_run: float | None = None  # with training, as measured, for the estimate of a dry run

    def grid_of(self, method: str) -> Grid:
        return self.grid | self.own_grid.get(method, {})

    def only(self, names: Sequence[str] | None) -> "Comparison":
        """The same of these methods alone; None: of all. Raises UsageError: a name that is no method."""
        for name in names or ():
            if name not in self.methods:
                raise UsageError(f"--only={name} is not a method of this comparison; {nearest(name, self.methods)}")
        if names is None:
            return self
        return replace(self, methods={name: self.methods[name] for name in names}, not_run={})


def read_comparison(path: Path) -> Comparison:
    """Raises UsageError: no such file, no YAML, a key or a value that is no comparison's."""
    try:
        given = OmegaConf.to_container(OmegaConf.load(path))
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}): give a comparison's YAML file") from error
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no YAML ({' '.join(str(error).split())}): see scripts/comparisons/") from error
    if not isinstance(given, dict):
        raise UsageError(f"{path} holds no keys: see scripts/comparisons/")
    refuse_unknown("", given, Comparison)
    comparison = Comparison(**given)
    check(comparison)
    return comparison


def check(comparison: Comparison) -> None:
    """Raises UsageError: the first entry that breaks a rule."""
    lists = {"common": comparison.common, "test": comparison.test}
    lists |= {f"methods.{name}": overrides for name, overrides in comparison.methods.items()}
    for key, overrides in lists.items():
        if not isinstance(overrides, list) or not all(isinstance(text, str) for text in overrides):
            raise UsageError(f"{key}={overrides!r} must be a list of overrides, such as [init=gradient]")
    for key in ("tuning_seeds", "seeds"):
        seeds = getattr(comparison, key)
        valid = isinstance(seeds, list) and all(isinstance(seed, int) and 0 <= seed < 2**32 for seed in seeds)
        if not valid or not seeds or len(set(seeds)) < len(seeds):
            raise UsageError(f"{key}={seeds!r} must be a list of different integers in [0, 2^32)")
    if not isinstance(comparison.test_examples, int) or comparison.test_examples < 1:
        raise UsageError(f"test_examples={comparison.test_examples!r} must be at least 1")
    if not comparison.methods:
        raise UsageError("methods={} names none: add <name>: [<overrides>]")
    for name in comparison.own_grid:
        if name not in comparison.methods:
            raise UsageError(f"own_grid.{name} is not a method; {nearest(name, comparison.methods)}")
    for name in comparison.methods:
        check_grid(comparison, name)


def check_grid(comparison: Comparison, method: str) -> None:
    """Raises UsageError: not a list of different numbers, or more or fewer values than the other methods try."""
    for key, values in comparison.grid_of(method).items():
        numbers = isinstance(values, list) and all(type(value) in (int, float) for value in values)
        if not numbers or not values or len(set(values)) < len(values):
            raise UsageError(f"grid of {method}: {key}={values!r} must be a list of different numbers")
        if is_same_for_all(key):
            raise UsageError(f"grid of {method}: {key} is the same for every method; move it to common")
        shared = comparison.grid.get(key, values)
        if len(values) != len(shared):
            raise UsageError(
                f"grid of {method}: {len(values)} values of {key}, {len(shared)} for the others; "
                "every method is tuned over equally many"
            )


@dataclass(frozen=True)
class Job:
    """A run to be: its configuration and folder, or the reason why there are none."""

    method: str
    stage: str
    point: Point
    seed: int
    config: RunConfig | None = None
    folder: RunFolder | None = None
    error: str | None = None

    @property
    def finished(self) -> bool:
        return self.folder is not None and self.folder.finished

    def __str__(self) -> str:
        values = "".join(f", {key.rpartition('.')[2]} {value:g}" for key, value in self.point.items())
        return f"{self.method}{values}, seed {self.seed}" + (", start" if self.stage == "start" else "")


class Jobs:
    """Makes jobs of a comparison. Raises UsageError at once where not even the common overrides can be composed."""

    def __init__(self, comparison: Comparison, compose: Compose):
        self.comparison, self.compose = comparison, compose
        self.shared = compose(comparison.common)
        for key in ("dry_run", "overwrite"):
            if getattr(self.shared, key):
                raise UsageError(f"{key}=true is no part of a comparison: take --dry-run, or remove the runs to redo")

    def configured(self, method: str, point: Point) -> RunConfig:
        """Raises UsageError: refused, or data, steps or judgement differ from the other methods'."""
        values = [f"{key}={value}" for key, value in point.items()]
        run = self.compose([*self.comparison.common, *self.comparison.methods[method], *values])
        given, shared = flatten(run), flatten(self.shared)
        for key in sorted(given.keys() | shared.keys()):
            if is_same_for_all(key) and given.get(key) != shared.get(key):
                raise UsageError(
                    f"{method} has {key}={given.get(key)}, the others {shared.get(key)}: it is the same for every "
                    "method; move it to common"
                )
        return run

    def tuning(self, method: str) -> list[Job]:
        """The whole grid with every tuning seed."""
        jobs = []
        for point in table.grid_points(self.comparison.grid_of(method)):
            seeds = self.comparison.tuning_seeds
            try:
                run = self.configured(method, point)
                jobs += [job_of(method, "tuning", point, replace(run, seed=seed)) for seed in seeds]
            except UsageError as error:
                jobs += [Job(method, "tuning", point, seed, error=str(error)) for seed in seeds]
        return jobs

    def final(self, tuning: Sequence[Job], chosen: Point) -> list[Job]:
        """The chosen point with every seed."""
        job = next(job for job in tuning if job.point == chosen)
        seeds = self.comparison.seeds
        return [job_of(job.method, "final", chosen, replace(job.config, seed=seed)) for seed in seeds]


def job_of(method: str, stage: str, point: Point, run: RunConfig) -> Job:
    """The job in the folder where run_exp.py puts it. Raises UsageError: the model's folder is not there."""
    place = placed(run)
    return Job(method, stage, point, run.seed, place.run, place.folder)


def is_same_for_all(key: str) -> bool:
    """Whether no method and no grid may change it."""
    return key in SAME or key.startswith("dataset.")


def start_of(trained: Job) -> Job:
    """The same run without training.

    A step size that follows from the warm-up is taken from the trained run: without training it would differ.
    """
    run = replace(trained.config, model=replace(trained.config.model, epochs=0.0))
    eta = trained.folder.read()["init"].get("eta")
    if eta is not None:
        run = replace(run, init=run.init.completed(lambda: eta))
    return job_of(trained.method, "start", trained.point, run)


def compare(comparison: Comparison, compose: Compose, execute: Execute, output: Path) -> bool:
    """Run what is not finished, measure, write comparison.md, .csv and .json into ``output``; True if nothing failed.

    Raises UsageError: the comparison as a whole cannot be done.  One run that fails is in the table, and the next
    goes on.
    """
    jobs = Jobs(comparison, compose)
    held_out = held_out_data(comparison, jobs)
    pretrained = held_out(output / "eval")
    runs: list[Run] = []
    rows = []
    for method in comparison.methods:
        grid = comparison.grid_of(method)
        tuning = jobs.tuning(method)
        done = [attempt(job, execute) for job in tuning]
        chosen = table.choose(table.grid_points(grid), done)
        if chosen is not None:
            done += measured(jobs.final(tuning, chosen), execute, held_out)
        runs += done
        rows.append(table.method_row(method, done, chosen, grid, pretrained))
    rows += [table.absent_row(method, reason) for method, reason in comparison.not_run.items()]
    write(comparison, held_out, runs, rows, output)
    return all(run.error is None for run in runs)


def held_out_data(comparison: Comparison, jobs: Jobs) -> HeldOut:
    """The split that is reported.

    Raises UsageError: one of its problems is among the others, or there are no validation examples.
    """
    run = jobs.shared
    held_out = HeldOut(run, jobs.compose([*comparison.common, *comparison.test]).dataset, comparison.test_examples)
    splits = load_dataset(run.dataset, encoder_for(run.model, run.dataset), run.model.max_length)
    if not splits.validation:
        raise UsageError("there are no validation examples to choose by: raise dataset.validation_size in common")
    seen = {example.prompt for example in [*splits.train_texts, *splits.validation_texts]}
    known = sum(example.prompt in seen for example in held_out.texts)
    if known:
        raise UsageError(
            f"{known} of the {len(held_out.texts)} test examples are training or validation examples: give others in "
            "test, such as dataset.path=<test file>"
        )
    return held_out


def measured(final: Sequence[Job], execute: Execute, held_out: HeldOut) -> list[Run]:
    """Each job trained and at its start, both with their loss on the held-out examples."""
    runs = []
    for job in final:
        runs.append(attempt(job, execute, held_out))
        if runs[-1].error is None:
            runs.append(attempt(start_of(job), execute, held_out))
    return runs


def attempt(job: Job, execute: Execute, held_out: HeldOut | None = None) -> Run:
    """Run it unless it is finished, and read what it measured; an error becomes part of the result."""
    error, loss = job.error, None
    if error is None:
        try:
            if not job.finished:
                print(f"\n== {job}: {job.folder.path}", flush=True)
                execute(job.config)
                gc.collect()  # a Trainer and its model hold each other; the next run gets their memory back
            trained = job.folder.adapter if job.config.peft.use_peft else job.folder.merged
            loss = held_out(job.folder.path / "eval", trained) if held_out else None
        except (UsageError, RunError) as failure:
            error = str(failure)
        except Exception as failure:  # of a library or ours: the traceback says where, the table what
            traceback.print_exc()
            error = f"{type(failure).__name__}: {failure}"
    if error is not None:
        print(f"failed: {job}: {error}", file=sys.stderr, flush=True)
        path = str(job.folder.path) if job.folder else None
        return Run(job.method, job.stage, job.point, job.seed, path, error)
    return finished(job, loss)


def finished(job: Job, test_loss: float | None = None) -> Run:
    """What run.json says of a finished run."""
    record = job.folder.read()
    return Run(
        job.method,
        job.stage,
        job.point,
        job.seed,
        str(job.folder.path),
        validation_loss=record["evaluation"]["final"]["eval_loss"],
        test_loss=test_loss,
        init_seconds=record["init"]["seconds"],
        train_seconds=record["train"]["seconds"],
        steps=record["train"]["steps"],
        tokens=record["train"]["tokens"],
        trainable_parameters=record["trainable_parameters"],
        git_commit=record["provenance"]["git_commit"],
        warnings=tuple(record["init"].get("warnings", ())),
    )


def write(
    comparison: Comparison, held_out: HeldOut, runs: Sequence[Run], rows: Sequence[dict[str, Any]], output: Path
) -> None:
    """comparison.md to read, comparison.csv to reckon with, comparison.json with every run and its folder."""
    keys = list(dict.fromkeys(key for method in comparison.methods for key in comparison.grid_of(method)))
    where, today = machine(), datetime.now(UTC).isoformat(timespec="seconds")
    used, uneven = versions(), table.uneven(runs)
    commits = sorted({str(run.git_commit) for run in runs if run.error is None})
    record = {
        "title": comparison.title,
        "date": today,
        "machine": where,
        "versions": used,
        "git_commit": git_commit(),
        "comparison": asdict(comparison),
        "test": held_out.settings | {"counts": held_out.counts, "fingerprints": held_out.fingerprints},
        "uneven": uneven,
        "rows": list(rows),
        "runs": [asdict(run) for run in runs],
    }
    write_json(output / "comparison.json", record)
    (output / "comparison.csv").write_text(table.as_csv(rows))
    notes = [
        f"Each method: all points of its grid with seeds {numbers(comparison.tuning_seeds)}, the one of the lowest "
        f"validation loss with seeds {numbers(comparison.seeds)}; mean +- sample standard deviation over these.",
        f"Test: {held_out.counts['examples']} examples ({held_out.counts['tokens']} tokens) that are in neither "
        "training nor validation. (lowest), (highest), (only): the chosen value is an end of those tried.",
        f"{where['cpu']}, {where['threads']} of {where['cores']} cores, on {where['device']}; torch {used['torch']}, "
        f"transformers {used['transformers']}, peft {used['peft']}; runs at commit {', '.join(commits)}; {today}.",
        *uneven,
    ]
    text = table.as_markdown(rows, keys)
    lines = [f"# {comparison.title}", "", text, "", *(f"- {note}" for note in notes)]
    (output / "comparison.md").write_text("\n".join(lines) + "\n")
    print(f"\n{text}\n\n" + "\n".join(notes) + f"\ncomparison: {output / 'comparison.md'}")


def numbers(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device()),
    }


def plan(comparison: Comparison, compose: Compose) -> str:
    """Every run, as far as it is known before the grids are done, and how long it may take; nothing is run."""
    jobs = Jobs(comparison, compose)
    lines = []
    trained = untrained = 0  # runs still to do
    for method in comparison.methods:
        known = jobs.tuning(method)
        if all(job.finished for job in known):
            chosen = table.choose([job.point for job in known], [finished(job) for job in known])
            final = jobs.final(known, chosen)
            known += final + [start_of(job) for job in final if job.finished]
            untrained += sum(not job.finished for job in final)
        elif not any(job.error for job in known):
            further = len(set(comparison.seeds) - set(comparison.tuning_seeds))
            lines.append(f"{method}: then the chosen point, {further} more seeds and {len(comparison.seeds)} starts")
            trained, untrained = trained + further, untrained + len(comparison.seeds)
        lines += [describe(job) for job in known]
        missing = [job.stage for job in known if job.error is None and not job.finished]
        trained, untrained = trained + len(missing) - missing.count("start"), untrained + missing.count("start")
    lines += [f"{method}: not run here, {reason}" for method, reason in comparison.not_run.items()]
    rate = comparison.seconds_per_run
    time = f", about {trained * rate / 60:.0f} minutes at {rate:g} s a trained one" if rate is not None else ""
    return "\n".join([*lines, f"{trained} runs with training and {untrained} without to do{time}"])


def describe(job: Job) -> str:
    if job.error is not None:
        return f"{job}: cannot run, {job.error}"
    return f"{job}: {'finished' if job.finished else 'to do'}, {job.folder.path}"
