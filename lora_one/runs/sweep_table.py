"""The table of a sweep on the screen, in files and in W&B."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_one.records.tracking import log_table
from lora_one.reports.table import SweepJob, save_sweep, sweep_csv, sweep_table
from lora_one.runs.planned_jobs import differing

if TYPE_CHECKING:
    from lora_one.runs.sweep import Job


def publish(jobs: Sequence["Job"], results: Path) -> None:
    """Print the table of these jobs, write it to ``results``, and log it to W&B. Raises OSError."""
    found = as_rows(jobs)
    print("\n" + sweep_table(found))
    path = save_sweep(found, results)
    print(f"table: {path} and {path.with_suffix('.csv').name}", flush=True)
    record = next(job.record for job in found if job.record is not None)
    log_table("sweep", path.stem, sweep_csv(found), record, results)


def as_rows(jobs: Sequence["Job"]) -> list[SweepJob]:
    """Return the jobs with their results; a job whose run another one has finished too appears once."""
    keys = differing([job.overrides for job in jobs])
    rows, seen = [], set()
    for job in jobs:
        values = {key: job.overrides[key] for key in keys if key in job.overrides}
        seed = f"seed {job.overrides['seed']}: " if "seed" in job.overrides else ""
        if job.folder is None:
            rows.append(SweepJob(values, note=f"{seed}{'not run' if job.error is None else 'failed: ' + job.error}"))
        elif job.folder.path not in seen:
            seen.add(job.folder.path)
            rows.append(SweepJob(values, job.folder.path, job.folder.read()))
    return rows
