"""Rows of a split, from a local file or folder or from the hub, read by the datasets library."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_one.errors import RunError, UsageError

Hub = tuple[str, str | None]  # id and configuration
FORMATS = {"json": "json", "jsonl": "json", "csv": "csv", "tsv": "csv", "parquet": "parquet"}


def read_rows(hub: Hub | None, path: str | None, split: str, columns: Sequence[str]) -> list[dict[str, str]]:
    """Rows of ``split``, with ``columns`` as text, from a local file or folder or (path None) from the hub.

    Raises UsageError: no such file, a format not known, a column missing.  RunError: unreadable, empty, or a
    hub that cannot be reached.
    """
    table = _local(Path(path).expanduser(), split) if path is not None else _from_hub(*hub, split)
    where = path if path is not None else hub[0]
    missing = [column for column in columns if column not in table.column_names]
    if missing:
        raise UsageError(
            f"{where} has no column {', '.join(missing)}; it has {', '.join(table.column_names)}: "
            f"{', '.join(columns)} are read; rename the columns, or take dataset=json with dataset.prompt=<column> "
            "and dataset.response=<column>"
        )
    rows = table.select_columns(list(columns)).to_list()
    if not rows:
        raise RunError(f"{where} holds no rows: give a file with examples")
    return [{column: as_text(row[column]) for column in columns} for row in rows]


def as_text(value: Any) -> str:
    """A cell as text: a number as it is written, null as nothing, anything nested as JSON."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def split_files(path: Path, split: str) -> list[Path]:
    """The file itself, or the folder's file of the split: ``train.jsonl``, ``train.json.gz``, or all its shards.

    Raises UsageError: none in the folder, or several that are not shards of one table.
    """
    if path.is_file():
        return [path]
    found = sorted(file for file in path.iterdir() if file.name.startswith(split) and format_of(file) is not None)
    if not found:
        names = ", ".join(sorted(file.name for file in path.iterdir())[:8]) or "nothing"
        raise UsageError(
            f"{path} holds no file that begins with {split!r} and ends in one of {', '.join(FORMATS)} "
            f"(.gz too); it holds {names}: give the file itself"
        )
    if len(found) > 1 and not all(re.search(r"-\d+-of-\d+", file.name) for file in found):
        raise UsageError(
            f"{path} holds several files for {split!r} ({', '.join(f.name for f in found)}): give one of them"
        )
    return found


def format_of(file: Path) -> str | None:
    endings = [ending.lstrip(".") for ending in file.suffixes if ending not in {".gz", ".bz2", ".xz"}]
    return FORMATS.get(endings[-1]) if endings else None


def _local(path: Path, split: str) -> Any:
    import datasets

    files = split_files(path, split)
    file, kind = files[0], format_of(files[0])
    if kind is None:
        raise UsageError(f"{file}: format not known; rows are read from {', '.join(FORMATS)} (.gz too)")
    if file.stat().st_size == 0:
        raise RunError(f"{file} is empty: give a file with examples")
    options = {"sep": "\t", "quoting": 3} if ".tsv" in file.suffixes else {}
    try:
        return datasets.load_dataset(kind, data_files={split: [str(f) for f in files]}, split=split, **options)
    except (OSError, ValueError, EOFError, StopIteration, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, StopIteration) or "corresponds to no data" in str(cause):  # nothing but blank lines
            raise RunError(f"{file} holds no rows: give a file with examples") from error
        reason = " ".join(str(cause).split())[:200]
        raise RunError(f"{file} cannot be read as {kind} ({reason}): check the file") from error


def _from_hub(name: str, subset: str | None, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, subset, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise RunError(
            f"dataset {name} cannot be loaded from the hub ({' '.join(str(error).split())[:160]}): where "
            "there is no network give a local file or folder (dataset.path=, --data_path=)"
        ) from error
