"""Resume points of a run: checkpoint-<step> folders, of which only the newest is kept."""

import json
import shutil
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import get_last_checkpoint

from lora_one.errors import RunError

HIDDEN = ".partial"  # folder in that of the resume points: holds those that are being written or removed


def last_checkpoint(checkpoints: Path) -> str | None:
    """Return the newest resume point in a folder; None: there is none."""
    return get_last_checkpoint(str(checkpoints)) if checkpoints.exists() else None


def step_of(point: str) -> int:
    """Return the optimizer steps done before a resume point.

    >>> step_of("run/checkpoints/checkpoint-500")
    500
    """
    return int(point.rpartition("-")[2])


def keep_only(newest: Path) -> None:
    """Remove the older resume points. Each is hidden first, because half of one must not look like a whole one."""
    hidden = newest.parent / HIDDEN
    for older in newest.parent.glob("checkpoint-*"):
        if older != newest:
            hidden.mkdir(exist_ok=True)
            older.rename(hidden / older.name)
    shutil.rmtree(hidden, ignore_errors=True)


def check_resume_point(checkpoints: Path) -> None:
    """Raise RunError when the newest resume point is incomplete; without one, there is nothing to check."""
    last = last_checkpoint(checkpoints)
    if last is None:
        return
    path = Path(last)
    try:
        json.loads((path / "trainer_state.json").read_text())["global_step"]
        whole = path / "model.safetensors"  # of full fine-tuning
        with safe_open(whole if whole.exists() else path / "adapter_model.safetensors", "pt") as tensors:
            tensors.keys()
        states = list(path.glob("rng_state*.pth")) or [path / "rng_state.pth"]
        for file in (path / "optimizer.pt", path / "scheduler.pt", *states):
            if not zipfile.is_zipfile(file):
                raise ValueError(f"{file.name} is {'cut short' if file.exists() else 'missing'}")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise RunError(
            f"the resume point {path} is broken ({type(error).__name__}: {error}): remove that folder, or add "
            "overwrite=true, and the run starts anew"
        ) from error
