"""Score a run of a comparison by benchmarks; finished evaluations are reused."""

import hashlib
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_one.errors import RunError, UsageError
from lora_one.evaluation.command import evaluate
from lora_one.records.folder import RunFolder
from lora_one.reports.scores import score_in
from lora_one.runs.comparison_file import Evaluation


def scores_of(folder: RunFolder, evaluations: Mapping[str, Evaluation]) -> dict[str, dict[str, Any]]:
    """Return the scores of a finished run by the name of the evaluation, see ``score_of``; ``error``: why it failed."""
    found = {}
    for name, evaluation in evaluations.items():
        try:
            found[name] = score_of(folder, name, evaluation)
        except (UsageError, RunError) as error:
            print(f"failed: evaluation {name} of {folder.path}: {error}", file=sys.stderr, flush=True)
            found[name] = {"error": str(error)}
    return found


def scored(folder: RunFolder, evaluations: Mapping[str, Evaluation]) -> bool:
    """Return whether every evaluation of a run has finished."""
    return all((folder_of(folder, *entry) / "metrics.json").exists() for entry in evaluations.items())


def score_of(folder: RunFolder, name: str, evaluation: Evaluation) -> dict[str, Any]:
    """Return the score of one evaluation, see ``score_in``; it is run unless it is finished.

    Raises UsageError, RunError.
    """
    output = folder_of(folder, name, evaluation)
    if not (output / "metrics.json").exists():
        model = ("--model_name", folder.merged) if folder.trained == folder.merged else ("--adapter", folder.trained)
        evaluate(evaluation.benchmark, [*evaluation.options, "=".join(map(str, model)), f"--output_dir={output}"])
    return score_in(output, evaluation.metric)


def folder_of(folder: RunFolder, name: str, evaluation: Evaluation) -> Path:
    """Return the folder of the results, inside the run: its name has a hash of the benchmark and its options."""
    asked = json.dumps([evaluation.benchmark, evaluation.options])
    return folder.path / "eval" / f"{folder_name(name)}-{hashlib.sha256(asked.encode()).hexdigest()[:8]}"


def folder_name(name: str) -> str:
    """Return the name of a task or an evaluation as that of a folder.

    >>> folder_name("SST-2, 2,000 rows")
    'sst-2-2-000-rows'
    """
    return re.sub(r"\W+", "-", name).strip("-").lower()
