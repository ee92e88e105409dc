"""Read tables from local files, with unchanged values."""

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple, TextIO

from lora_one.errors import RunError, UsageError

FORMATS = {"json": "json", "jsonl": "json", "csv": "csv", "tsv": "csv", "parquet": "parquet"}
TOGETHER = 4096  # rows that are Python objects at a time


class Table(NamedTuple):
    """The names of the columns of a table, and a function that returns its rows, with the columns that are asked for.

    A row need not have all of them, and may have others.
    """

    names: list[str]
    rows: Callable[[Sequence[str]], Iterator[dict[str, Any]]]

    @classmethod
    def of(cls, rows: list[dict[str, Any]]) -> "Table":
        """Return the table of rows that are in memory."""
        return cls(list(dict.fromkeys(name for row in rows for name in row)), lambda _: iter(rows))


def format_of(file: Path) -> str | None:
    """Return json, csv or parquet, by the file's name; None: another format."""
    endings = [ending.lstrip(".") for ending in file.suffixes if ending not in {".gz", ".bz2", ".xz"}]
    return FORMATS.get(endings[-1]) if endings else None


def read_table(file: Path, headless: Sequence[str] = ()) -> Table:
    """Return the table of a file, without columns if it has no rows. headless: as in ``sources.each_row``.

    The rows of parquet files are read while the iterator advances.
    Raises UsageError: an unknown format.  RunError: the file cannot be read.
    """
    if format_of(file) is None:
        raise UsageError(f"{file} has an unknown format: pass a file of the type {', '.join(FORMATS)} (also .gz)")
    with reading(file, format_of(file)):
        return READERS[format_of(file)](file, headless)


@contextmanager
def reading(file: Path, form: str) -> Iterator[None]:
    """Return a context in which a failure to read a file becomes a RunError. form: what it is read as."""
    try:
        yield
    except (OSError, ValueError, EOFError, NotImplementedError) as error:
        reason = shorten(" ".join(str(error).split()), 200)
        raise RunError(f"{file} cannot be read as {form} ({reason}): check the file") from error


def opened(file: Path, newline: str | None = None) -> TextIO:
    """Open a text in UTF-8, compressed or not. newline: as in ``open``."""
    opener = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(file.suffix, open)
    return opener(file, "rt", encoding="utf-8-sig", newline=newline)


def read_text(file: Path) -> str:
    """Return the whole text of a file, also a compressed one. Raises RunError: it cannot be read."""
    with reading(file, "text in UTF-8"), opened(file, newline="") as stream:
        return stream.read()


def _json_table(file: Path, _: Sequence[str]) -> Table:
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
    return Table.of(rows)


def _csv_table(file: Path, headless: Sequence[str]) -> Table:
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
        return Table.of([])
    if not isinstance(table.index, pandas.RangeIndex):  # pandas would take the first column for names of the rows
        raise ValueError(f"the rows have more cells than the header, {', '.join(map(str, table.columns))}")
    return Table.of(table.to_dict("records"))


def _parquet_table(file: Path, _: Sequence[str]) -> Table:
    """Read the columns' names of a parquet file; of its rows, TOGETHER are in memory at a time."""
    import pyarrow.parquet

    metadata = pyarrow.parquet.read_metadata(file)
    names = metadata.schema.to_arrow_schema().names if metadata.num_rows else []

    def rows(columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        with reading(file, "parquet"), pyarrow.parquet.ParquetFile(file, memory_map=True) as opened:
            batches = opened.iter_batches(TOGETHER, columns=[name for name in columns if name in names])
            yield from (row for batch in batches for row in batch.to_pylist())

    return Table(names, rows)


READERS: dict[str, Callable[[Path, Sequence[str]], Table]] = {
    "json": _json_table,
    "csv": _csv_table,
    "parquet": _parquet_table,
}
