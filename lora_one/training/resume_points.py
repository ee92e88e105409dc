"""Resume points of a run: folders checkpoint-<step>, of which only the newest is kept."""

import json
import shutil
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.trainer_utils import get_last_checkpoint

from lora_one.errors import RunError

STATE = "trainer_state.json"  # of the Trainer
SECONDS = "seconds.json"  # of training until a resume point, over all its interruptions
HIDDEN = ".partial"  # subfolder for resume points that are being written or removed


def last_checkpoint(checkpoints: Path) -> str | None:
    """Return the newest resume point in a folder; None: there is none."""
    return get_last_checkpoint(str(checkpoints)) if checkpoints.exists() else None


def step_of(point: str) -> int:
    """Return the number of optimizer steps before a resume point.

    >>> step_of("run/checkpoints/checkpoint-500")
    500
    """
    return int(point.rpartition("-")[2])


def state_of(point: str) -> TrainerState:
    """Return the Trainer's state at a resume point."""
    return TrainerState.load_from_json(str(Path(point) / STATE))


def seconds_of(point: str | None) -> float:
    """Return the seconds of training until a resume point; 0 without one, or if an earlier version wrote it."""
    path = Path(point) / SECONDS if point else None
    return json.loads(path.read_text()) if path and path.exists() else 0.0


def keep_only(newest: Path) -> None:
    """Remove the older resume points. Each is hidden first, so that a partly deleted one is never used."""
    hidden = newest.parent / HIDDEN
    for older in newest.parent.glob("checkpoint-*"):
        if older != newest:
            hidden.mkdir(exist_ok=True)
            older.rename(hidden / older.name)
    shutil.rmtree(hidden, ignore_errors=True)


def check_resume_point(checkpoints: Path) -> None:
    """Raise RunError if the newest resume point is incomplete; without resume points there is nothing to check."""
    last = last_checkpoint(checkpoints)
    if last is None:
        return
    path = Path(last)
    try:
        json.loads((path / STATE).read_text())["global_step"]
        model = path / "model.safetensors"  # only after full fine-tuning
        with safe_open(model if model.exists() else path / "adapter_model.safetensors", "pt") as tensors:
            tensors.keys()
        states = list(path.glob("rng_state*.pth")) or [path / "rng_state.pth"]
        for file in (path / "optimizer.pt", path / "scheduler.pt", *states):
            if not zipfile.is_zipfile(file):
                raise ValueError(f"{file.name} is {'incomplete' if file.exists() else 'missing'}")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise RunError(
            f"the resume point {path} is damaged ({type(error).__name__}: {error}): delete that folder, or add "
            "overwrite=true, to start the run from the beginning"
        ) from error
