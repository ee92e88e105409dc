"""Score a run of a comparison by benchmarks; finished evaluations are reused."""

import hashlib
import json
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from lora_one.errors import reason_of
from lora_one.evaluation.command import evaluate
from lora_one.files import fingerprint, folder_name
from lora_one.records.folder import RunFolder
from lora_one.reports.scores import score_in
from lora_one.runs.comparison_scores import Evaluation, options_of


def scores_of(folder: RunFolder, evaluations: Mapping[str, Evaluation]) -> dict[str, dict[str, Any]]:
    """Return the scores of a finished run by the name of the evaluation, see ``score_of``; ``error``: why it failed."""
    found = {}
    for name, evaluation in evaluations.items():
        try:
            found[name] = score_of(folder, name, evaluation)
        except Exception as failure:  # the test loss and the other scores of the run must not be lost
            found[name] = {"error": told(name, folder.path, failure)}
    return found


def told(name: str, place: Path, failure: Exception) -> str:
    """Print why an evaluation failed, and return it."""
    error = reason_of(failure)
    print(f"failed: evaluation {name} of {place}: {error}", file=sys.stderr, flush=True)
    return error


def epoch_scores(folder: RunFolder, evaluations: Mapping[str, Evaluation]) -> dict[str, dict[str, float]]:
    """Return name -> epoch -> value of what model.keep_epochs=true has kept, without the end of the training.

    An evaluation that fails is left out, and its error is printed.
    """
    kept = epochs_before_the_end(folder)
    found: dict[str, dict[str, float]] = {}
    for name, evaluation in evaluations.items():
        try:
            for epoch in kept:
                output = folder_of(folder, name, evaluation) / "epochs" / epoch.name
                found.setdefault(name, {})[epoch.name] = score_of_model(epoch, output, evaluation)["value"]
        except Exception as failure:
            told(name, epoch, failure)
            found.pop(name, None)
    return found


def epochs_before_the_end(folder: RunFolder) -> list[Path]:
    """Return the folders of the kept epochs, in their order, without that of the last step."""
    if not folder.epochs.exists():
        return []
    kept = sorted(
        (place for place in folder.epochs.iterdir() if place.name.isdigit()), key=lambda place: int(place.name)
    )
    return [place for place in kept if int(place.name) != folder.read()["config"]["model"]["epochs"]]


def scored(folder: RunFolder, evaluations: Mapping[str, Evaluation]) -> bool:
    """Return whether every evaluation of a run and its kept epochs has finished."""
    places = ["", *(f"epochs/{place.name}" for place in epochs_before_the_end(folder))]
    return all(
        (folder_of(folder, *entry) / place / "metrics.json").exists()
        for entry in evaluations.items()
        for place in places
    )


def score_of(folder: RunFolder, name: str, evaluation: Evaluation) -> dict[str, Any]:
    """Return the score of one evaluation of a run, see ``score_of_model``."""
    return score_of_model(folder.trained, folder_of(folder, name, evaluation), evaluation)


def score_of_model(model: Path, output: Path, evaluation: Evaluation) -> dict[str, Any]:
    """Return the score of an adapter or a whole model, as ``score_in`` but without the settings.

    It is evaluated unless that has finished.  output: the folder of the results.  Raises UsageError, RunError.
    """
    if not (output / "metrics.json").exists():
        option = "--adapter" if (model / "adapter_config.json").exists() else "--model_name"
        evaluate(evaluation.benchmark, [*evaluation.options, f"{option}={model}", f"--output_dir={output}"])
    score = score_in(output, evaluation.metric)
    del score["settings"]  # they are those of the comparison file
    return score


def folder_of(folder: RunFolder, name: str, evaluation: Evaluation) -> Path:
    """Return the folder of the results, inside the run: its name has a hash of the benchmark, its options and data.

    A run that was trained with a chat template has another hash, because earlier versions evaluated it without.
    """
    path = options_of(evaluation).data_path
    data = [] if path is None else [path]
    template = ["chat_template"] if folder.with_template else []
    asked = json.dumps([evaluation.benchmark, evaluation.options, *map(content_of, data), *template])
    return folder.path / "eval" / f"{folder_name(name)}-{hashlib.sha256(asked.encode()).hexdigest()[:8]}"


@cache
def content_of(path: str) -> str:
    """Return a hash of local data; "": there is none, which the evaluation reports."""
    place = Path(path).expanduser()
    return fingerprint(place, nested=True) if place.exists() else ""
