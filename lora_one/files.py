"""Files and folders that appear whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lora_one.errors import RunError


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_whole(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write to a temporary file beside, then rename: a reader sees the old content or the new, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def synced(path: Path) -> None:
    """Wait until a file or folder, with all in it, is on the disk: a power cut takes nothing of it."""
    for entry in (path, *path.rglob("*")):
        handle = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def publish(folder: Path, place: Path) -> None:
    """Give a complete folder its name, once all of it is on the disk. Raises OSError."""
    synced(folder)
    folder.rename(place)
    handle = os.open(place.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Write into a hidden folder beside; it takes the name ``path`` when all of it is there.

    Raises RunError when it cannot be written (no space left, say); what stood at ``path`` is then untouched.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
            content = Path(scratch) / path.name
            content.mkdir()
            yield content
            if path.exists():
                shutil.rmtree(path)
            publish(content, path)
    except (OSError, SafetensorError) as error:  # the latter: of a full disk, from safetensors
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"{path} cannot be written ({reason}): free space or give another folder") from error
