"""Read the rows of a split: from local files, with unchanged values, or from the hub by the datasets library."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from lora_one.datasets.tables import FORMATS, TOGETHER, Table, format_of, read_table
from lora_one.errors import RunError, UsageError

Hub = tuple[str, str | None]  # id and configuration


def read_rows(
    hub: Hub | None, path: str | None, split: str, columns: Sequence[str], **options: Any
) -> list[dict[str, Any]]:
    """Return the rows of a split as a list; arguments and errors as ``each_row``."""
    return list(each_row(hub, path, split, columns, **options))


def each_row(
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
) -> Iterator[dict[str, Any]]:
    """Return the rows of ``split``, with ``columns`` as text, from a local file or folder or (path None) from the hub.

    Rows of parquet files and of the hub are read in parts, while the iterator advances.
    other_names: column -> its alternative name in local files.  headless: the columns of a .tsv file without a header,
    that is, if its first line contains none of their names.  nested: columns kept unchanged.  optional: columns that
    are read if they exist.  first: maximal number of rows; None: all.
    Raises UsageError: no such file, an unknown format, a missing column.  RunError: the file is unreadable or empty,
    or the hub cannot be reached.
    """
    if path is not None:
        where, table = path, local_table(Path(path).expanduser(), split, headless)
    else:
        where, table = hub[0], hub_table(*hub, split, first)
    others = (other_names or {}).items() if path is not None else ()
    renamed = {other: column for column, other in others if column not in table.names}
    source = {renamed.get(name, name): name for name in table.names}
    columns = [*columns, *nested]
    missing = [column for column in columns if column not in source]
    if missing:
        raise UsageError(
            f"{where} has no column {', '.join(missing)}; its columns are {', '.join(source)}, required are "
            f"{', '.join(columns)}: rename the columns, or train with dataset=json dataset.prompt=<column> "
            "dataset.response=<column>, conversations with dataset=chat dataset.messages=<column>"
        )
    columns = [*columns, *(column for column in optional if column in source)]

    def cell(row: dict[str, Any], column: str) -> Any:
        value = row.get(source[column])
        return value if column in nested else as_text(value, column, where)

    rows = islice(table.rows([source[column] for column in columns]), first)
    return ({column: cell(row, column) for column in columns} for row in rows)


def as_text(value: Any, column: str, where: str) -> str:
    """Return a cell as text: numbers and booleans in JSON's form, a missing value (null, NaN) as the empty string.

    Raises UsageError: the cell is a list or an object, or a text that UTF-8 does not have.
    """
    if isinstance(value, (list, dict)):
        raise UsageError(
            f"{where}: column {column} must contain text, but a value is a {type(value).__name__}: choose another "
            "column"
        )
    if value is None or value != value:
        return ""
    if isinstance(value, str):
        return checked_text(value, f"{where}: column {column}")
    return json.dumps(value) if isinstance(value, bool | int | float) else str(value)


def checked_text(text: str, where: str) -> str:
    """Return the text. Raises UsageError: it has half of a surrogate pair, as JSON can write it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        part = text[max(0, error.start - 20) : error.end].encode(errors="backslashreplace").decode()
        raise UsageError(
            f"{where} has a text with half of a character, \\u{ord(text[error.start]):04x}, after {part!r}: correct or "
            "remove the row"
        ) from error
    return text


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


def local_rows(path: Path, split: str, headless: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return the rows of a local file, or of the split of a folder, with unchanged values. Raises as ``read_rows``."""
    table = local_table(path, split, headless)
    return list(table.rows(table.names))


def local_table(path: Path, split: str, headless: Sequence[str] = ()) -> Table:
    """Return the table of a local file, or of the split of a folder. Raises as ``read_rows``."""
    files = split_files(path, split)
    tables = [read_table(file, headless) for file in files]
    names = list(dict.fromkeys(name for table in tables for name in table.names))
    if not names:
        raise RunError(f"{files[0]} has no rows: pass a file with examples")
    return Table(names, lambda columns: (row for table in tables for row in table.rows(columns)))


def hub_table(name: str, subset: str | None, split: str, first: int | None) -> Table:
    """Return the names of the columns of a split on the hub, and its rows, which are read while the iterator advances.

    Raises RunError: it cannot be loaded.
    """
    table = from_hub(name, subset, split, first)
    with loading(name):
        names = table.column_names or list(next(iter(table)))  # a stream may not know its columns

    def rows(columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        batches = iter(table.select_columns(columns).with_format("arrow").iter(TOGETHER))
        while True:
            with loading(name):
                batch = next(batches, None)
            if batch is None:
                return
            yield from batch.to_pylist()

    return Table(names, rows)


def from_hub(name: str, subset: str | None, split: str, first: int | None = None) -> Any:
    """Return a split as a table of the datasets library; with ``first``, a stream, of which only so many rows are read.

    Raises RunError: it cannot be loaded.
    """
    import datasets

    with loading(name):
        table = datasets.load_dataset(name, subset, split=split, streaming=first is not None)
        return table if first is None else table.take(first)


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Return a context in which a failure to load a data set of the hub becomes a RunError."""
    import datasets

    try:
        yield
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise RunError(
            f"dataset {name} cannot be loaded from the hub ({' '.join(str(error).split())[:160]}): if there is no "
            "network, pass a local file or folder (dataset.path=, dataset.decontaminate=, --data_path=)"
        ) from error
