"""The status of a run in run.json: running, then finished, failed or interrupted."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from lora_one.config import RunConfig
from lora_one.config.rules import flatten
from lora_one.distributed import Processes
from lora_one.errors import RunError
from lora_one.interruption import note_progress
from lora_one.models import local_folder
from lora_one.records.folder import LocatedRun, RunFolder, revision_in
from lora_one.records.provenance import provenance
from lora_one.records.tracking import Tracker
from lora_one.training.resume_points import last_checkpoint


def begun(run: RunConfig, folder: RunFolder) -> dict[str, Any]:
    """Return the content of run.json if the run continues from a resume point, which needs its start; else {}."""
    record = folder.read()
    resumes = not run.overwrite and last_checkpoint(folder.checkpoints) is not None and "evaluation" in record
    return record if resumes else {}


def with_commit(run: RunConfig, earlier: dict[str, Any]) -> RunConfig:
    """Return the run with the commit of the hub model that it began with as its revision. earlier: see ``begun``."""
    return replace(run, model=replace(run.model, revision=revision_in(earlier))) if earlier else run


# keys that change what is measured or kept in a run, and nothing in its adapter, so that its folder is the same
ACCURACY, OF_ACCURACY = "dataset.accuracy_examples", ("dataset.max_new_tokens", "dataset.answer")
MEASURED = (ACCURACY, *OF_ACCURACY, "model.keep_epochs", "wandb.diagnostics_every", "wandb.curvature_examples")


def measured_otherwise(run: RunConfig, record: dict[str, Any]) -> str:
    """Return how a finished or interrupted run was measured, if the settings now ask for something else; else "".

    record: the content of its run.json.
    """
    was, now = flatten(record.get("config", {})), flatten(run.published())
    left_out = () if was.get(ACCURACY) or now[ACCURACY] else OF_ACCURACY
    changed = [key for key in MEASURED if key in was and was[key] != now[key] and key not in left_out]
    return ", ".join(f"{key}={was[key]}" for key in changed)


@contextmanager
def recorded(located: LocatedRun, commit: str | None) -> Iterator[Tracker]:
    """Keep the status in run.json up to date during a run; a run that is not resumed deletes old results first.

    commit: of the hub model; None: it is local.
    """
    run, folder, processes = located.run, located.folder, Processes.current()
    resuming = bool(begun(run, folder))
    processes.meet()  # nothing is deleted before every process has looked for a resume point
    if not resuming and processes.rank == 0:
        folder.clear()
    record = folder.update(
        status="running",
        config=run.published(),
        config_hash=located.config_hash,
        provenance=provenance(located.fingerprints, local_folder(run.model.name), commit),
        wandb_id=folder.read().get("wandb_id") or secrets.token_hex(6),  # a resumed run continues the same W&B run
    )
    processes.meet()
    tracker = Tracker(folder.metrics, main_process=processes.rank == 0)
    try:
        started = tracker.start_wandb(record, folder.path)
        if not resuming and started not in (None, record["wandb_id"]):  # it began offline, which takes another id
            folder.update(wandb_id=started)
        yield tracker
    except BaseException as error:
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        with suppress(RunError):  # on a full disk, for example; the original error is more important
            folder.update(status=status, error=f"{type(error).__name__}: {error}")
        tracker.finish({"status": status}, exit_code=1)
        raise
    record = folder.update(status="finished", error=None)
    note_progress()
    final = record["evaluation"].get("final", {})
    tracker.finish({"status": "finished", "train": record.get("train"), "evaluation": record["evaluation"]} | final)
