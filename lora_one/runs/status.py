"""The status of a run in run.json: running, then finished, failed or interrupted."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from lora_one.distributed import Processes
from lora_one.errors import RunError
from lora_one.models import local_folder
from lora_one.records.folder import LocatedRun
from lora_one.records.provenance import provenance
from lora_one.records.tracking import Tracker
from lora_one.training.resume_points import last_checkpoint


@contextmanager
def recorded(located: LocatedRun) -> Iterator[Tracker]:
    """Keep the status in run.json up to date during a run; without a resume point, delete old results first."""
    run, folder, processes = located.run, located.folder, Processes.current()
    resuming = not run.overwrite and last_checkpoint(folder.checkpoints) is not None
    processes.meet()  # nothing is deleted before every process has looked for a resume point
    if not resuming and processes.rank == 0:
        folder.clear()
    record = folder.update(
        status="running",
        config=run.published(),
        config_hash=located.config_hash,
        provenance=provenance(located.fingerprints, local_folder(run.model.name)),
        wandb_id=folder.read().get("wandb_id") or secrets.token_hex(6),  # a resumed run continues the same W&B run
    )
    processes.meet()
    tracker = Tracker(folder.metrics, main_process=processes.rank == 0)
    try:
        tracker.start_wandb(record, folder.path)
        yield tracker
    except BaseException as error:
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        with suppress(RunError):  # on a full disk, for example; the original error is more important
            folder.update(status=status, error=f"{type(error).__name__}: {error}")
        tracker.finish({"status": status}, exit_code=1)
        raise
    record = folder.update(status="finished", error=None)
    final = record["evaluation"].get("final", {})
    tracker.finish({"status": "finished", "train": record.get("train"), "evaluation": record["evaluation"]} | final)
