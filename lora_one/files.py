"""Write files and folders atomically: a reader sees all of the content or none."""

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
    """Write to a temporary file in the same folder, then rename: a reader sees the old content or the new one."""
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
    """Wait until a file, or a folder with its content, is on the disk, so that it survives a power failure."""
    for entry in (path, *path.rglob("*")):
        handle = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def publish(folder: Path, place: Path) -> None:
    """Rename a complete folder to its final name after its content is on the disk. Raises OSError."""
    synced(folder)
    folder.rename(place)
    handle = os.open(place.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a hidden folder next to ``path`` to write into; it is renamed to ``path`` when it is complete.

    Raises RunError: it cannot be written (for example, no space left); an old folder at ``path`` is then unchanged.
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
    except (OSError, SafetensorError) as error:  # safetensors raises the latter on a full disk
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"{path} cannot be written ({reason}): free space or choose another folder") from error
