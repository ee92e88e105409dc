"""Write files and folders atomically: a reader sees the complete content or none. The fingerprints of their content."""

import errno
import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lora_one.errors import RunError

RECENT = 10.0  # seconds
_digests: dict[tuple[str, int, int, int, int], str] = {}  # (path, inode, size, times of change) -> sha256


def is_listed(path: Path) -> bool:
    """Return whether a file is in the list of its folder: over NFS, ``exists`` may be out of date."""
    return path.name in {file.name for file in path.parent.iterdir()}


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
        os.chmod(name, mode_of_new_files())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_lines(path: Path, having: str = "") -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines, [] without a file.

    An incomplete last line, which a crash may leave, is left out.  having: only lines with this text are parsed.
    """
    text = whole_lines(path.read_text()) if path.exists() else ""
    return [json.loads(line) for line in text.split("\n") if having in line and line]


def folder_name(name: str) -> str:
    """Return the name of a task, an evaluation or a figure as that of a folder, a file or an anchor.

    >>> folder_name("SST-2, 2,000 rows")
    'sst-2-2-000-rows'
    """
    return re.sub(r"\W+", "-", name).strip("-").lower()


def synced(path: Path) -> None:
    """Flush a file, or a folder with its content, to the disk, so that it survives a power failure.

    The files get at least the permissions of new files; safetensors writes files that only their owner can read.
    """
    mode = mode_of_new_files()
    for entry in (path, *path.rglob("*")):
        if entry.is_file() and not entry.is_symlink():
            with suppress(OSError):  # a file system without permissions
                entry.chmod(entry.stat().st_mode | mode)
        synced_entry(entry)


def mode_of_new_files() -> int:
    """Return the permissions of a new file. The umask is read from /proc, because os.umask has to set it to read it."""
    try:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Umask:"))
        umask = int(line.split()[1], 8)
    except (OSError, StopIteration):
        os.umask(umask := os.umask(0o077))
    return 0o666 & ~umask


def synced_entry(path: Path) -> None:
    """Flush one file, or the list of a folder's files, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(folder: Path, place: Path) -> None:
    """Flush a complete folder to the disk, then rename it to its final path. Raises OSError."""
    synced(folder)
    folder.rename(place)
    synced_entry(place.parent)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a hidden folder next to ``path`` to write to; at the end of the block it replaces ``path``.

    Raises RunError: it cannot be written (no space left, for example); an old folder at ``path`` is then unchanged.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
            content, old = Path(scratch) / path.name, Path(scratch) / f"{path.name}.old"
            content.mkdir()
            yield content
            synced(content)
            try:
                if path.is_dir():
                    path.rename(old)
                publish(content, path)
            except BaseException:
                if old.exists() and not path.exists():
                    old.rename(path)
                raise


@contextmanager
def whole_files(path: Path) -> Iterator[Path]:
    """Yield a hidden folder to write to; at the end of the block its files are moved to the folder ``path``.

    A file replaces an older one of the same name atomically; other files in ``path`` stay. A new folder appears
    complete. Raises RunError: it cannot be written; the older files are then unchanged.
    """
    if not path.is_dir():
        with whole_folder(path) as content:
            yield content
        return
    with writing(path), tempfile.TemporaryDirectory(dir=path, prefix=".") as scratch:
        yield Path(scratch)
        synced(Path(scratch))
        for file in sorted(Path(scratch).rglob("*")):
            place = path / file.relative_to(scratch)
            if file.is_dir():
                place.mkdir(exist_ok=True)
            else:
                file.replace(place)
                synced_entry(place.parent)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Return a context in which a failure to write ``path`` becomes a RunError."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # SafetensorError: a full disk
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"{path} cannot be written ({reason}): free disk space, or choose another folder") from error


def full_disk(error: Exception) -> str | None:
    """Return the message about a disk without space; None: it is another error."""
    if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    return f"{error.filename or 'a file'} cannot be written ({error.strerror}): free disk space, and repeat the command"


def whole_lines(text: str) -> str:
    """Return a text without its last line if that has no line break, as where a process was killed while writing."""
    return text[: text.rfind("\n") + 1]


def fingerprint(path: Path, *, nested: bool = False) -> str:
    """Return the sha256 of a file's content and suffixes, or of the names and contents of a folder's files.

    Hidden files are left out. Subfolders are left out unless ``nested``: a run may write its results below the model.
    Links are followed.
    """
    single = path.is_file()
    entries = [path] if single else files_below(path) if nested else path.iterdir()
    files = sorted(p for p in entries if p.is_file() and (single or not p.name.startswith(".")))
    total = hashlib.sha256()
    for file in files:
        content = content_digest(file)
        # the suffixes of a single file decide how a table is read
        name = "".join(file.suffixes) if single else file.relative_to(path).as_posix()
        total.update(f"{name}\0{content}\n".encode())
    return total.hexdigest()


def files_below(path: Path) -> Iterator[Path]:
    """Yield the files in a folder and its subfolders, also in those that are links."""
    for folder, _, names in os.walk(path, followlinks=True):
        yield from (Path(folder) / name for name in names)


def content_digest(file: Path) -> str:
    """Return the sha256 (hex) of a file's content, of an unchanged file without reading it again.

    The jobs of a sweep have the same model and data, which take minutes to read if they are large. A file that was
    changed in the last RECENT seconds is always read, because two changes at once may have the same time.
    """
    state = file.stat()
    key = (str(file.absolute()), state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
    if key not in _digests:
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if time.time() - max(state.st_mtime, state.st_ctime) < RECENT:
            return found
        _digests[key] = found
    return _digests[key]
