"""The record of a comparison, comparison.json, from which its report is made."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lora_one.evaluation.held_out import HeldOut
from lora_one.files import write_json
from lora_one.invocation import command_name
from lora_one.records.folder import RunFolder
from lora_one.records.provenance import git_commit, machine, versions
from lora_one.records.tracking import log_table
from lora_one.reports import compare as table
from lora_one.reports.compare import Run
from lora_one.reports.findings import findings
from lora_one.runs.comparison_file import Comparison

RECORD = "comparison.json"


def save(
    comparison: Comparison, held_out: HeldOut | None, runs: Sequence[Run], rows: Sequence[dict[str, Any]], output: Path
) -> dict[str, Any]:
    """Write comparison.json and the table as comparison.csv to ``output``, log the table to W&B; return the record.

    held_out: the test data; None: nothing was run.
    """
    test = {}
    if held_out is not None:
        test = held_out.settings | {"counts": held_out.counts, "fingerprints": held_out.fingerprints}
    record = {
        "title": comparison.title,
        "command": shlex.join([*shlex.split(command_name()), *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "git_commit": git_commit(),
        "comparison": asdict(comparison),
        "test": test,
        "uneven": table.uneven(runs),
        "rows": list(rows),
        "findings": tested(comparison, runs),
        "runs": [asdict(run) for run in runs],
    }
    write_json(output / RECORD, record)
    (output / "comparison.csv").write_text(table.as_csv(rows))
    first = next((run for run in runs if run.path and run.error is None), None)
    if first is not None:
        log_table("comparison", output.name, table.as_csv(rows), RunFolder(Path(first.path)).read(), output)
    return record


def save_without_runs(comparison: Comparison, output: Path) -> dict[str, Any]:
    """Write the record of a comparison that runs none of its evaluations, so that the report names it; return it."""
    rows = [{"method": method, "note": ""} for method in comparison.methods]
    rows += [table.absent_row(method, reason) for method, reason in comparison.not_run.items()]
    return save(comparison, None, [], rows, output)


def tested(comparison: Comparison, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the findings of a comparison, [] without a baseline."""
    if comparison.baseline is None:
        return []
    family = len(comparison.methods) - 1 + len(comparison.left_out)
    return findings(runs, comparison.baseline, list(comparison.evaluations), family=family)
