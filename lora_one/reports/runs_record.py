"""The record of the runs in a results folder, in the form of a comparison's, so that the same report is made of it."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lora_one.errors import UsageError, nearest
from lora_one.records.folder import RunFolder, reason_in
from lora_one.reports.compare import RATE, Run, method_row
from lora_one.reports.findings import VALIDATION, findings
from lora_one.reports.measurements import Record, measurements
from lora_one.reports.scores import HELD_OUT, difference_of_settings, score_in
from lora_one.reports.shown import main_figure, shown_methods

ACCURACY = "validation accuracy"
# Keys of a configuration that do not distinguish methods. Those of a dry run are the same in all finished runs
NOT_SHOWN = {"seed", "results_dir", "overwrite", "process_timeout_s"}


@dataclass
class Task:
    """The runs of a folder <project>_<dataset>, and the configuration of each method by <group>.<key>."""

    runs: list[Run] = field(default_factory=list)
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, run: Run, config: Mapping[str, Any]) -> None:
        self.runs.append(run)
        if run.error is None:
            self.configs[run.method] = entries(config)


def records_of_runs(results: Path, baseline: str | None = None) -> dict[str, dict[str, Any]]:
    """Return task -> record, a task being a folder <project>_<dataset> with runs; "" if there is one.

    A method is a configuration: the folder that contains its seeds.  baseline: such a folder's name, or its beginning.
    Raises UsageError: there is no run, or no configuration of this name.
    """
    tasks: dict[str, Task] = {}
    root = results.resolve()
    for folder, record in started(root):
        place = folder.path.parent.parent
        name = place.name if place.parent == root else str(place)
        tasks.setdefault(name, Task()).add(run_of(folder, record), record.get("config") or {})
    if not tasks:
        raise UsageError(
            f"{results} contains no run: pass the results_dir of runs, or the folder of a comparison (with "
            "comparison.json)"
        )
    methods = dict.fromkeys(run.method for task in tasks.values() for run in task.runs)
    meant = [method for method in methods if baseline and method.startswith(baseline)]
    if baseline is not None and not meant:
        raise UsageError(f"--baseline={baseline} is not a configuration of {results}; {nearest(baseline, methods)}")
    if len(meant) > 1 and baseline not in meant:
        raise UsageError(
            f"--baseline={baseline} begins the names of several configurations: pass one of {', '.join(meant)}"
        )
    named = {"": next(iter(tasks.values()))} if len(tasks) == 1 else tasks
    return {name: record_of(name or f"Runs in {root.name}", task, baseline) for name, task in named.items()}


def started(root: Path) -> Iterator[tuple[RunFolder, Record]]:
    """Yield the folders of all runs that were started, by path, with the content of run.json. root: absolute."""
    for path in sorted(Path(path) for path, _, files in os.walk(root) if "run.json" in files):
        folder = RunFolder(path)
        record = folder.read()
        if "status" in record and (record.get("config") or record["status"] == "failed"):
            yield folder, record


def run_of(folder: RunFolder, record: Record) -> Run:
    """Return a run with its measurements, or with the reason why it has none. record: its run.json."""
    config = record.get("config") or {}
    seed = config.get("seed", int(folder.path.name) if folder.path.name.isdigit() else 0)
    point = {RATE: config["model"]["learning_rate"]} if config else {}
    method = folder.path.parent.name
    if record["status"] != "finished":
        return Run(method, "final", point, seed, str(folder.path), reason_in(record))
    found = measurements(folder, record)
    return Run(method, "final", point, seed, str(folder.path), scores=scores_of(folder, record), **found)


def scores_of(folder: RunFolder, record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the scores of a run: the accuracy of its validation, and the main metric of each evaluation in eval/.

    Answers are not read, see ``add_answers``.
    """
    found = {}
    final = record["evaluation"].get("final", {})
    if final.get("eval_accuracy") is not None:
        found[ACCURACY] = {"value": final["eval_accuracy"], "predictions": None}
    for file in sorted((folder.path / "eval").rglob("metrics.json")):
        name = str(file.parent.relative_to(folder.path / "eval"))
        score = score_in(file.parent, with_answers=False)
        if score["task"] != HELD_OUT:
            found[name] = score
    return found


def add_answers(run: Run) -> None:
    """Add the files with the answers of a run's evaluations to its scores."""
    for name in run.scores.keys() - {ACCURACY}:
        found = score_in(Path(run.path) / "eval" / name)
        run.scores[name] |= {key: found[key] for key in ("predictions", "field")}


def differences(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return for each method the configuration keys whose values differ between methods, as text."""
    keys = dict.fromkeys(key for config in configs.values() for key in config if key not in NOT_SHOWN)
    shown = [key for key in keys if len({str(config.get(key)) for config in configs.values()}) > 1]
    return {
        method: ", ".join(f"{key}={config[key]}" for key in shown if config.get(key) is not None)
        for method, config in configs.items()
    }


def entries(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a configuration by <group>.<key>."""
    found = {}
    for group, value in config.items():
        found |= {f"{group}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {group: value}
    return found


def record_of(title: str, task: Task, baseline: str | None) -> Record:
    """Return the record of a task. Answers to questions are read and compared for the methods that a report shows."""
    of_method: dict[str, list[Run]] = {}
    for run in task.runs:
        of_method.setdefault(run.method, []).append(run)
    evaluations = list(dict.fromkeys(name for run in task.runs for name in run.scores))
    against = next((method for method in of_method if baseline and method.startswith(baseline)), None)
    against = baseline if baseline in of_method else against
    differing = differences(task.configs)
    first = {name: next(run.scores[name] for run in task.runs if name in run.scores) for name in evaluations}
    rows = [row_of(method, runs, evaluations, differing.get(method, "")) for method, runs in of_method.items()]
    for row in rows:
        row["note"] = "; ".join(filter(None, [row["note"], *other_settings(of_method[row["method"]], first)]))
    for score in (score for run in task.runs for score in run.scores.values()):
        score.pop("settings", None)  # they are in metrics.json
    versions = next((run.identity["versions"] for run in task.runs if run.identity), {})
    return {
        "title": title,
        "command": None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": "see run.json of each run",
        "versions": versions,
        "comparison": {"evaluations": {name: {} for name in evaluations}, "baseline": against},
        "rows": rows,
        "findings": tested(of_method, against, evaluations) if against else [],
        "runs": [vars(run) for run in task.runs],
    }


def row_of(method: str, runs: Sequence[Run], evaluations: Sequence[str], differing: str) -> dict[str, Any]:
    """Return the row of a configuration, with what distinguishes it in its note."""
    point = next((run.point for run in runs if run.point), {})
    row = method_row(method, runs, point, [point], None, evaluations) | {"edge": ""}
    return row | {"note": "; ".join(filter(None, [differing, row["note"]]))}


def other_settings(runs: Sequence[Run], first: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    """Yield a note for each evaluation that some of a method's runs made with other settings than the first run.

    first: evaluation -> its score of the first run that has it.
    """
    for name, reference in first.items():
        scores = (run.scores[name] for run in runs if name in run.scores and name != ACCURACY)
        differing = next(filter(None, (difference_of_settings(reference, score) for score in scores)), None)
        if differing is not None:
            yield f"{name}: not with the same settings: {differing}"


def tested(of_method: Mapping[str, list[Run]], baseline: str, evaluations: Sequence[str]) -> list[dict[str, Any]]:
    """Return the findings of a task against one of its methods."""
    runs = [run for own in of_method.values() for run in own]
    shown = shown_methods(runs, list(of_method), main_figure(runs, evaluations), baseline)
    for run in (run for method in shown for run in of_method[method]):
        add_answers(run)
    return findings(runs, baseline, evaluations, VALIDATION, answered=shown, family=len(of_method) - 1)
