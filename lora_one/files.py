"""Write files and folders atomically: a reader sees the complete content or none."""

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
    """Write a JSON file atomically. Raises ValueError: a number is NaN or infinite."""
    write_whole(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically: to a temporary file in the same folder, which is then renamed."""
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
    """Flush a file, or a folder with its content, to the disk, so that it survives a power failure."""
    for entry in (path, *path.rglob("*")):
        handle = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def publish(folder: Path, place: Path) -> None:
    """Flush a complete folder to the disk, then rename it to its final path. Raises OSError."""
    synced(folder)
    folder.rename(place)
    handle = os.open(place.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a hidden folder next to ``path`` to write to; at the end of the block it replaces ``path``.

    Raises RunError: it cannot be written (no space left, for example); an old folder at ``path`` is then unchanged.
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
    except (OSError, SafetensorError) as error:  # SafetensorError: a full disk
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"{path} cannot be written ({reason}): free disk space, or choose another folder") from error
