"""Read the rows of a split: from local files, with unchanged values, or from the hub by the datasets library."""

import bz2
import csv
import gzip
import json
import lzma
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, TextIO

from lora_one.errors import RunError, UsageError

Hub = tuple[str, str | None]  # id and configuration
FORMATS = {"json": "json", "jsonl": "json", "csv": "csv", "tsv": "csv", "parquet": "parquet"}


def read_rows(
    hub: Hub | None,
    path: str | None,
    split: str,
    columns: Sequence[str],
    *,
    other_names: Mapping[str, str] | None = None,
    headless: Sequence[str] = (),
    nested: Sequence[str] = (),
    optional: Sequence[str] = (),
    first: int | None = None,
) -> list[dict[str, Any]]:
    """Return the rows of ``split``, with ``columns`` as text, from a local file or folder or (path None) from the hub.

    other_names: column -> its alternative name in local files.  headless: the columns of a .tsv file without a header,
    that is, if its first line contains none of their names.  nested: columns kept unchanged.  optional: columns that
    are read if they exist.  first: maximal number of rows; None: all.
    Raises UsageError: no such file, an unknown format, a missing column.  RunError: the file is unreadable or empty,
    or the hub cannot be reached.
    """
    if path is not None:
        where, rows = path, local_rows(Path(path).expanduser(), split, headless)[:first]
        names = list(dict.fromkeys(name for row in rows for name in row))
        renamed = {other: column for column, other in (other_names or {}).items() if column not in names}
        rows = [{renamed.get(name, name): value for name, value in row.items()} for row in rows]
        names = [renamed.get(name, name) for name in names]
    else:
        where, table = hub[0], from_hub(*hub, split, first)
        names = table.column_names
    columns = [*columns, *nested]
    missing = [column for column in columns if column not in names]
    if missing:
        raise UsageError(
            f"{where} has no column {', '.join(missing)}; its columns are {', '.join(names)}, required are "
            f"{', '.join(columns)}: rename the columns; for training they can also be named: dataset=json "
            "dataset.prompt=<column> dataset.response=<column>, conversations: dataset=chat dataset.messages=<column>"
        )
    columns = [*columns, *(column for column in optional if column in names)]
    if path is None:
        rows = table.select_columns(columns).to_list()

    def cell(row: dict[str, Any], column: str) -> Any:
        return row.get(column) if column in nested else as_text(row.get(column), column, where)

    return [{column: cell(row, column) for column in columns} for row in rows]


def as_text(value: Any, column: str, where: str) -> str:
    """Return a cell as text: numbers and booleans in JSON's form, null as the empty string.

    Raises UsageError: the cell is a list or an object.
    """
    if isinstance(value, (list, dict)):
        raise UsageError(
            f"{where}: column {column} must contain text, but a value is a {type(value).__name__}: choose another "
            "column"
        )
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def split_files(path: Path, split: str) -> list[Path]:
    """Return the file itself, or the folder's file of the split (``train.jsonl``, ``train.json.gz``) or its shards.

    Files ``dev`` (of GLUE) and ``val`` (of SuperGLUE) count as ``validation``.
    Raises UsageError: the folder has no such file, or several that are not shards of one table.
    """
    if path.is_file():
        return [path]
    opening = opening_of(split, split.replace("validation", "dev"), split.replace("validation", "val"))
    found = sorted(file for file in path.iterdir() if opening.match(file.name) and format_of(file) is not None)
    if not found:
        names = ", ".join(sorted(file.name for file in path.iterdir())[:8]) or "nothing"
        raise UsageError(
            f"{path} has no file whose name begins with {split!r} and ends in {', '.join(FORMATS)} (also .gz); it "
            f"contains {names}: pass the path of the file"
        )
    if len(found) > 1 and not all(re.search(r"-\d+-of-\d+", file.name) for file in found):
        raise UsageError(
            f"{path} has several files for {split!r} ({', '.join(f.name for f in found)}): pass the path of one of them"
        )
    return found


def opening_of(*names: str) -> re.Pattern[str]:
    """Return the pattern of file names that begin with one of these; ``val`` must be a whole word (not values.csv)."""
    return re.compile("|".join(r"val(?![A-Za-z])" if name == "val" else re.escape(name) for name in names))


def evaluation_data(path: str) -> str | None:
    """Return the folder with the test or validation split that belongs to local training data; None: none is found.

    path: of the training data, a file or a folder.
    """
    place = Path(path).expanduser()
    folder = place.parent if place.is_file() else place
    opening = opening_of("test", "validation", "dev", "val")
    held_out = [file for file in (*folder.iterdir(), *folder.glob("*/*")) if opening.match(file.name)]
    return str(folder) if any(format_of(file) for file in held_out) else None


def format_of(file: Path) -> str | None:
    """Return json, csv or parquet, by the file's name; None: another format."""
    endings = [ending.lstrip(".") for ending in file.suffixes if ending not in {".gz", ".bz2", ".xz"}]
    return FORMATS.get(endings[-1]) if endings else None


def local_rows(path: Path, split: str, headless: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return the rows of a local file, or of the split of a folder, with unchanged values. Raises as ``read_rows``."""
    files = split_files(path, split)
    rows: list[dict[str, Any]] = []
    for file in files:
        if format_of(file) is None:
            raise UsageError(f"{file} has an unknown format: pass a file of the type {', '.join(FORMATS)} (also .gz)")
        try:
            rows += READERS[format_of(file)](file, headless)
        except (OSError, ValueError, EOFError) as error:
            reason = shorten(" ".join(str(error).split()), 200)
            raise RunError(f"{file} cannot be read as {format_of(file)} ({reason}): check the file") from error
    if not rows:
        raise RunError(f"{files[0]} has no rows: pass a file with examples")
    return rows


def opened(file: Path, newline: str | None = None) -> TextIO:
    """Open a text in UTF-8, compressed or not. newline: as in ``open``."""
    opener = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(file.suffix, open)
    return opener(file, "rt", encoding="utf-8-sig", newline=newline)


def read_text(file: Path) -> str:
    """Return the whole text of a file, also a compressed one. Raises RunError: it cannot be read."""
    try:
        with opened(file, newline="") as stream:
            return stream.read()
    except (OSError, ValueError, EOFError) as error:
        reason = shorten(" ".join(str(error).split()), 200)
        raise RunError(f"{file} cannot be read as text in UTF-8 ({reason}): check the file") from error


def _json_rows(file: Path, _: Sequence[str]) -> list[dict[str, Any]]:
    """Read a list of objects, or one object per line, with unchanged values. Raises ValueError: anything else."""
    with opened(file) as stream:
        text = stream.read()
    if text.lstrip().startswith("["):
        rows = json.loads(text)
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), start=1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("each row must be an object {column: value}")
    return rows


def _csv_rows(file: Path, headless: Sequence[str]) -> list[dict[str, Any]]:
    """Read every cell as text: None, NA and 007 stay as written. In a .tsv, quotes are part of the text."""
    import pandas

    tabs = ".tsv" in file.suffixes
    options: dict[str, Any] = {"dtype": str, "keep_default_na": False, "encoding": "utf-8-sig"}
    options |= {"sep": "\t", "quoting": csv.QUOTE_NONE} if tabs else {}
    try:
        if tabs and headless and not set(headless) & set(pandas.read_csv(file, nrows=0, **options).columns):
            options |= {"header": None, "names": list(headless)}
        table = pandas.read_csv(file, **options)
    except pandas.errors.EmptyDataError:
        return []
    return table.to_dict("records")


def _parquet_rows(file: Path, _: Sequence[str]) -> list[dict[str, Any]]:
    """Read a parquet file. Raises ValueError: it cannot be read."""
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(file).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from error


READERS: dict[str, Callable[[Path, Sequence[str]], list[dict[str, Any]]]] = {
    "json": _json_rows,
    "csv": _csv_rows,
    "parquet": _parquet_rows,
}


def from_hub(name: str, subset: str | None, split: str, first: int | None = None) -> Any:
    """Return a split as a table of the datasets library; with ``first``, only so many rows are streamed.

    Raises RunError: it cannot be loaded.
    """
    import datasets

    try:
        if first is None:
            return datasets.load_dataset(name, subset, split=split)
        stream = datasets.load_dataset(name, subset, split=split, streaming=True)
        return datasets.Dataset.from_list(list(stream.take(first)))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise RunError(
            f"dataset {name} cannot be loaded from the hub ({' '.join(str(error).split())[:160]}): if there is no "
            "network, pass a local file or folder (dataset.path=, dataset.decontaminate=, --data_path=)"
        ) from error
