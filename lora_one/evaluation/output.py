"""The folder of an evaluation's results: where it is, and whether it contains a finished evaluation."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lora_one.errors import RunError, UsageError
from lora_one.evaluation.engines import TRANSFORMERS
from lora_one.evaluation.options import EvaluationOptions
from lora_one.evaluation.source import base_name
from lora_one.files import fingerprint, write_whole
from lora_one.records.folder import RunFolder, base_of, revision_of, run_of
from lora_one.statistics.shares import percent
from lora_one.statistics.units import POINTS, unit_in

OF_BASE = {"base": "the hash of the base's content", "base_loading": "the loading of the base"}


def output_folder(task: str, options: EvaluationOptions) -> Path:
    """Return --output_dir, else a folder inside the evaluated run, else a folder named after the model."""
    if options.output_dir:
        return Path(options.output_dir).expanduser()
    if options.rescore:
        return Path(options.rescore).parent / "rescored"
    found = evaluated_run(options)
    if found is not None:
        run, model = found
        return run.path / "eval" / (Path("epochs", model.name) if model.parent.name == "epochs" else "") / task
    name = Path(options.adapter).resolve().name if options.adapter else options.model.strip("/").replace("/", "--")
    return Path("eval_results") / name / task


def evaluated_run(options: EvaluationOptions) -> tuple[RunFolder, Path] | None:
    """Return the run that saved the evaluated adapter or model, and the path of that; None: it is not part of a run.

    The run of an adapter's base is another one.
    """
    given = options.adapter or options.model_name
    run = run_of(Path(given)) if given else None
    return None if run is None else (run, Path(given).expanduser().resolve())


def same_file(one: Path, other: str) -> bool:
    """Return whether two paths lead to the same place."""
    return one.resolve() == Path(other).resolve()


def finished_report(output: Path, options: EvaluationOptions) -> dict[str, Any] | None:
    """Return the report of the same evaluation if it has finished, else None.

    Raises UsageError: the folder contains the results of another evaluation, or the file of --rescore.
    """
    file = output / "metrics.json"
    if options.rescore and same_file(output / "predictions.jsonl", options.rescore):
        raise UsageError(
            f"--output_dir={output} contains the file of --rescore, which would be overwritten: pass another folder"
        )
    if options.overwrite or not file.exists():
        return None
    try:
        report = json.loads(file.read_text())
        found = {"model": report["model"], "settings": report["settings"], **report["provenance"]}
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{file} is not the report of an evaluation ({error!r}): remove it, pass --overwrite, or --output_dir="
            "<another folder>"
        ) from error
    wanted = {"model": options.model, "settings": options.settings, "fingerprints": data_fingerprints(options)}
    if options.served_model is not None:  # without this option, it was the only model of the server
        wanted["engine"] = {"model": options.served_model}
        found["engine"] = {"model": report.get("engine", {}).get("model")}
    difference = first_difference(found, wanted)
    if difference is None:
        return report
    raise UsageError(
        f"{file} contains results of another model or other settings ({difference}): pass --output_dir=<another "
        "folder>, or --overwrite to replace them"
    )


def first_difference(found: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """Return in words the first difference between two evaluations; None: there is none.

    found, wanted: model, settings, the fingerprints of local files, and the engine, if it is known.

    >>> first_difference({"model": "a", "settings": {"seed": 1}}, {"model": "a", "settings": {"seed": 2}})
    '--seed is 1 there and 2 here'
    """

    # versions before 2026-11-29 do not have all facts about an adapter's base
    unknown = {name for name in OF_BASE if any(name not in part["fingerprints"] for part in (found, wanted))}
    # whose content is the same: its path may be written in another way, or be another one
    equal = {name for name, _ in found["fingerprints"].items() & wanted["fingerprints"].items()}

    def flat(identity: dict[str, Any]) -> dict[str, Any]:
        earlier = {"engine": TRANSFORMERS, "chat_template": False}  # of versions without these options
        chosen = {**earlier, **identity["settings"]}
        settings = {f"--{name}": value for name, value in chosen.items() if name not in equal}
        if source_of_model(identity) not in equal:
            settings = {"--model_name": identity["model"]} | settings
        engine = {f"the engine's {name}": value for name, value in identity.get("engine", {}).items()}
        contents = {
            OF_BASE.get(name, f"the hash of --{name}'s content"): text if name == "base_loading" else text[:8]
            for name, text in identity["fingerprints"].items()
            if name not in unknown
        }
        return settings | engine | contents

    there, here = flat(found), flat(wanted)
    for name in {**here, **there}:
        if there.get(name) != here.get(name):
            before, now = ("not given" if part.get(name) is None else part[name] for part in (there, here))
            return f"{name} is {before} there and {now} here"
    return None


def source_of_model(identity: dict[str, Any]) -> str:
    """Return the option that the identity's ``model`` is the value of; see ``EvaluationOptions.model``."""
    if identity["model"] == identity["settings"].get("adapter"):
        return "adapter"
    return "rescore" if identity["model"].startswith("completions of ") else "model_name"


def data_fingerprints(options: EvaluationOptions) -> dict[str, str]:
    """Return the fingerprint of each local file or folder that determines the results.

    base: that of the adapter, if it is local.  base_loading: how the base is loaded.
    """
    local = {name: getattr(options, name) for name in ("model_name", "adapter", "data_path", "rescore")}
    if options.adapter and not options.model_name:
        local["base"] = base_name(Path(options.adapter))
    paths = {name: Path(value).expanduser() for name, value in local.items() if value}
    found = {name: fingerprint(path, nested=name == "data_path") for name, path in paths.items() if path.exists()}
    return found | ({"base_loading": base_loading(options, Path(options.adapter))} if options.adapter else {})


def base_loading(options: EvaluationOptions, adapter: Path) -> str:
    """Return how an adapter's base is loaded: quantisation, dtype and commit, as the adapter's run says.

    A copy of the adapter outside of its run has the same content, but may be evaluated on another base.
    """
    facts = base_of(adapter, options.dtype)
    revision = revision_of(adapter, options.model_name or base_name(adapter))
    return ", ".join(filter(None, [facts.get("quantization"), facts.get("dtype"), revision])) or "as stored"


def check_writable(output: Path) -> None:
    """Raise RunError if the folder cannot be written; called before the evaluation, so no work is lost."""
    existing = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise RunError(
            f"{output} cannot be written, because {existing} is not a writable folder: pass --output_dir=<a writable "
            "folder>"
        )


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object per line."""
    write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def show(task: str, report: dict[str, Any]) -> None:
    """Print the metrics, the counts and the remarks.

    A share of all examples is followed by its Wilson interval, another metric by its standard error, if it has one.
    """
    metrics, counts = report["metrics"], report["counts"]
    for name, value in metrics.items():
        if not name.endswith("_stderr"):
            unit, error = unit_in(report, name), metrics.get(f"{name}_stderr")
            digits = 2 if unit == POINTS else unit.digits
            text = f"{unit.scale * value:.{digits}f} {unit.value_name}"
            text += "" if error is None else f" (standard error {unit.scale * error:.{digits}f})"
            of_all = unit == POINTS and name.startswith("accuracy") and "/" not in name
            print(f"{task} {name}: {percent(value, counts['total']).strip() if of_all else text}")
    for part in (counts, report.get("remarks", {})):
        if part:
            print("  ".join(f"{name} {count}" for name, count in part.items()))
