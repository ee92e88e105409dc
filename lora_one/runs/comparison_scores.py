"""The evaluations that a comparison file names, which are checked before anything runs."""

from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, fields
from io import StringIO
from typing import Any

from lora_one.config import refuse_unknown
from lora_one.errors import UsageError, nearest
from lora_one.evaluation import BENCHMARKS
from lora_one.evaluation.command import parser_of
from lora_one.evaluation.options import EvaluationOptions, parsed

SET_HERE = {"model_name", "adapter", "output_dir", "rescore", "overwrite", "base_url", "served_model", "no_score"}


@dataclass(frozen=True)
class Evaluation:
    """A benchmark that scores the chosen points: its name, its options as on its command line, and one of its metrics.

    metric: None: accuracy, or else the first one that it reports.  options: not those that choose model or folder.
    not_run: the reason why the evaluation is not run; it then has no benchmark, only a column in the report.
    """

    benchmark: str | None = None
    options: list[str] = field(default_factory=list)
    metric: str | None = None
    not_run: str | None = None


def evaluations_of(given: Any) -> dict[str, Evaluation]:
    """Return the evaluations of the file. Raises UsageError: an entry has an unknown key, no benchmark or no reason."""
    example, absent = "<name>: {benchmark: <benchmark>, options: [--limit=200]}", "<name>: {not_run: <reason>}"
    if not isinstance(given, dict) or not all(isinstance(entry, dict) for entry in given.values()):
        raise UsageError(f"evaluations={given!r} must be a mapping of names, for example {example}")
    for name, entry in given.items():
        if not entry.keys() & {"benchmark", "not_run"}:
            raise UsageError(f"evaluations.{name} has no benchmark: write {example}, or {absent} if it is not run")
        refuse_unknown(f"evaluations.{name}.", entry, Evaluation)
        if entry.get("metric") is not None and not isinstance(entry["metric"], str):
            raise UsageError(f"evaluations.{name}.metric={entry['metric']!r} must be a text: the name of one metric")
        if "not_run" not in entry:
            continue
        if len(entry) > 1:
            raise UsageError(f"evaluations.{name} has other keys beside not_run: write {absent}, or remove not_run")
        if not isinstance(entry["not_run"], str) or not entry["not_run"].strip():
            raise UsageError(f"evaluations.{name}.not_run={entry['not_run']!r} must be a text: the reason")
    return {name: Evaluation(**entry) for name, entry in given.items()}


def evaluated(evaluations: Mapping[str, Evaluation]) -> dict[str, Evaluation]:
    """Return the evaluations that are run."""
    return {name: evaluation for name, evaluation in evaluations.items() if evaluation.not_run is None}


def none_is_run(evaluations: Mapping[str, Evaluation]) -> bool:
    """Return whether a comparison names evaluations and runs none of them, so that nothing is trained for it."""
    return bool(evaluations) and not evaluated(evaluations)


def absences(evaluations: Mapping[str, Evaluation]) -> list[str]:
    """Return a line for each evaluation that is not run, with the reason."""
    return [f"{name}: not run yet: {found.not_run}" for name, found in evaluations.items() if found.not_run]


def check_evaluation(name: str, evaluation: Evaluation) -> None:
    """Check an evaluation that is run. Raises UsageError: an unknown benchmark, or an option that it does not have."""
    if not isinstance(evaluation.benchmark, str) or evaluation.benchmark not in BENCHMARKS:
        known = nearest(str(evaluation.benchmark), BENCHMARKS)
        raise UsageError(f"evaluations.{name}: {evaluation.benchmark} is not a benchmark; {known}")
    options = evaluation.options
    if not isinstance(options, list) or not all(isinstance(text, str) for text in options):
        raise UsageError(f"evaluations.{name}: options={options!r} must be a list, for example [--limit=200]")
    said = StringIO()
    try:
        with redirect_stderr(said), redirect_stdout(StringIO()):
            found = options_of(evaluation)
    except SystemExit as error:  # how argparse reports a mistake, or shows its help
        reason = (said.getvalue().strip().splitlines() or [f"{options} runs nothing"])[-1].removeprefix("error: ")
        raise UsageError(f"evaluations.{name}: {reason}") from error
    for one in fields(found):
        if one.name in SET_HERE and getattr(found, one.name) != one.default:
            instead = "use --serve" if one.name == "base_url" else "remove it"
            raise UsageError(f"evaluations.{name}: --{one.name} is set by the comparison; {instead}")


def options_of(evaluation: Evaluation) -> EvaluationOptions:
    """Return the options of an evaluation, as its command reads them, unchecked."""
    benchmark = BENCHMARKS[evaluation.benchmark]
    return parsed(parser_of(evaluation.benchmark, benchmark), benchmark.options, evaluation.options)
