"""The record of the runs in a results folder, in the form of a comparison's, so that the same report is made of it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lora_one.errors import UsageError, nearest
from lora_one.records.folder import RunFolder
from lora_one.reports.compare import RATE, Run, method_row
from lora_one.reports.findings import VALIDATION, findings
from lora_one.reports.measurements import measurements
from lora_one.reports.scores import score_in

ACCURACY = "validation accuracy"
NOT_SHOWN = {
    "seed",
    "results_dir",
    "overwrite",
    "process_timeout_s",
}  # configuration keys that do not distinguish methods


def records_of_runs(results: Path, baseline: str | None = None) -> dict[str, dict[str, Any]]:
    """Return task -> record, a task being a folder <project>_<dataset> with runs; "" if there is one.

    A method is a configuration: the folder that contains its seeds.  baseline: such a folder's name, or its beginning.
    Raises UsageError: there is no run, or no configuration of this name.
    """
    tasks: dict[str, list[Run]] = {}
    for folder in folders(results):
        task = folder.path.parent.parent
        name = task.name if task.parent == results.resolve() else str(task)
        tasks.setdefault(name, []).append(run_of(folder))
    if not tasks:
        raise UsageError(
            f"{results} contains no run: pass the results_dir of runs, or the folder of a comparison (with "
            "comparison.json)"
        )
    methods = dict.fromkeys(run.method for runs in tasks.values() for run in runs)
    meant = [method for method in methods if baseline and method.startswith(baseline)]
    if baseline is not None and not meant:
        raise UsageError(f"--baseline={baseline} is not a configuration of {results}; {nearest(baseline, methods)}")
    if len(meant) > 1 and baseline not in meant:
        raise UsageError(
            f"--baseline={baseline} begins the names of several configurations: pass one of {', '.join(meant)}"
        )
    named = {"": next(iter(tasks.values()))} if len(tasks) == 1 else tasks
    return {
        task: record_of(task or f"Runs in {results.resolve().name}", runs, baseline) for task, runs in named.items()
    }


def folders(results: Path) -> Iterator[RunFolder]:
    """Yield the folders of all runs that have ended, by path."""
    for file in sorted(results.rglob("run.json")):
        folder = RunFolder(file.parent.resolve())
        if folder.read().get("status") in ("finished", "failed"):
            yield folder


def run_of(folder: RunFolder) -> Run:
    """Return a run with its measurements, or with its error."""
    record = folder.read()
    config = record.get("config") or {}
    seed = config.get("seed", int(folder.path.name) if folder.path.name.isdigit() else 0)
    point = {RATE: config["model"]["learning_rate"]} if config else {}
    method = folder.path.parent.name
    if record["status"] == "failed":
        return Run(method, "final", point, seed, str(folder.path), record.get("error") or "no reason is known")
    found = measurements(folder)
    return Run(method, "final", point, seed, str(folder.path), scores=scores_of(folder, record), **found)


def scores_of(folder: RunFolder, record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the scores of a run: the accuracy of its validation, and the first metric of each evaluation in eval/."""
    found = {}
    final = record["evaluation"].get("final", {})
    if final.get("eval_accuracy") is not None:
        found[ACCURACY] = {"value": final["eval_accuracy"], "predictions": None}
    for file in sorted((folder.path / "eval").rglob("metrics.json")):
        name = str(file.parent.relative_to(folder.path / "eval"))
        if not name.startswith("loss-"):
            found[name] = score_in(file.parent)
    return found


def differences(runs: Sequence[Run]) -> dict[str, str]:
    """Return for each method the configuration keys whose values differ between methods, as text."""
    finished = [run for run in runs if run.error is None]
    configs = {run.method: entries(RunFolder(Path(run.path)).read()["config"]) for run in finished}
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


def record_of(title: str, runs: Sequence[Run], baseline: str | None) -> dict[str, Any]:
    """Return the record of a task."""
    methods = list(dict.fromkeys(run.method for run in runs))
    evaluations = list(dict.fromkeys(name for run in runs for name in run.scores))
    against = next((method for method in methods if baseline and method.startswith(baseline)), None)
    against = baseline if baseline in methods else against
    rows, differing = [], differences(runs)
    for method in methods:
        own = [run for run in runs if run.method == method]
        point = next((run.point for run in own if run.point), {})
        rows.append(method_row(method, own, point, [point], None, evaluations) | {"edge": ""})
        rows[-1]["note"] = "; ".join(filter(None, [differing.get(method, ""), rows[-1]["note"]]))
    versions = next((run.identity["versions"] for run in runs if run.identity), {})
    return {
        "title": title,
        "command": None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": "see run.json of each run",
        "versions": versions,
        "comparison": {"evaluations": {name: {} for name in evaluations}, "baseline": against},
        "rows": rows,
        "findings": findings(runs, against, evaluations, VALIDATION) if against else [],
        "runs": [asdict(run) for run in runs],
    }
