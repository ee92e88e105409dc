"""Tables in Arrow files: written in parts, and memory-mapped, so that no process holds a whole one in its memory."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import pyarrow as pa

from lora_one.distributed import Processes
from lora_one.files import mode_of_new_files

UNREAD = 90 * 86400  # seconds after which an entry that was not read is deleted
ENTRIES = ("examples-*", "encoded-*", "measured-*")
FACTS = "facts"


class Table(NamedTuple):
    """Columns of a data set, and facts about all of its rows, such as counts."""

    columns: pa.Table
    facts: dict[str, Any]


class Parts(NamedTuple):
    """The parts of a table in order; ``facts`` are complete after the last one."""

    batches: Iterator[pa.RecordBatch]
    facts: dict[str, Any]

    def together(self) -> Table:
        """Return the table, in memory."""
        found = list(self.batches)
        return Table(pa.Table.from_batches(found) if found else pa.table({}), self.facts)


def kept(file: Path, message: str, find: Callable[[], Parts], *, valid: bool = True) -> Table:
    """Return the table of a cache's file; if it is missing or damaged, compute and write it.

    The first process writes, while the others wait; those that then cannot read the file, because they are on another
    node, write it too. If it cannot be written, a note is printed and the table is computed in memory.
    valid: False: the file may be out of date, so it is written again.
    """
    processes = Processes.current()
    found = read(file) if valid else None
    try:
        if processes.rank == 0 and found is None:
            found = found_and_written(file, find, message)
        elif processes.rank == 0:
            print(f"{message}, from {file}", flush=True)
    finally:  # also if the first process fails: the others must not wait forever
        facts = processes.gathered(found and found.facts)[0]
    if found is None:
        found = read(file)
        if found is not None and found.facts != facts:  # an older file of another node
            found = None
    return found_and_written(file, find, None) if found is None else found


def found_and_written(file: Path, find: Callable[[], Parts], message: str | None) -> Table:
    """Compute an entry, write it to the cache and map it; print why, and a note if it cannot be written.

    message: None: nothing is printed.
    """
    if message:
        damaged = f" ({file} is damaged)" * (file.exists() and read(file) is None)
        print(f"{message} and kept in {file.parent}{damaged}", flush=True)
    try:
        write(file, find)
        found, reason = read(file), "it cannot be read again"
    except (OSError, pa.ArrowException) as error:
        found, reason = None, error
    if found is None and message:
        print(
            f"note: dataset.cache={file.parent} cannot be written ({reason}), so the run continues without a cache: "
            "choose a writable folder, or dataset.cache=null"
        )
    return find().together() if found is None else found


def read(file: Path) -> Table | None:
    """Return the table of a file, memory-mapped, so processes share it; None: it is missing or broken."""
    try:
        with pa.ipc.open_file(pa.memory_map(str(file))) as opened:
            last = opened.get_batch_with_custom_metadata(opened.num_record_batches - 1)
            facts = json.loads(last.custom_metadata[FACTS])
            columns = opened.read_all()
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
        return None
    with suppress(OSError):  # the file may belong to another user
        file.touch()
    return Table(columns, facts)


def write(file: Path, find: Callable[[], Parts]) -> None:
    """Write an entry atomically, and delete entries that were not read for ``UNREAD`` seconds. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f"{file.name}.{uuid4().hex}")
    try:
        with pa.OSFile(str(beside), "wb") as sink:
            write_parts(sink, find())
        beside.chmod(mode_of_new_files())
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)
    for entry in (entry for pattern in ENTRIES for entry in file.parent.glob(pattern)):
        with suppress(OSError):  # another process has removed it, or it belongs to another user
            if time.time() - entry.stat().st_mtime > UNREAD:
                entry.unlink()


def write_parts(sink: pa.NativeFile, parts: Parts) -> None:
    """Write the parts of a table; the facts are the metadata of a last part without rows."""
    first = next(parts.batches, None)
    schema = pa.schema([]) if first is None else first.schema
    with pa.ipc.new_file(sink, schema) as writer:
        if first is not None:
            writer.write_batch(first)
        for batch in parts.batches:
            writer.write_batch(batch)
        writer.write_batch(pa.RecordBatch.from_pylist([], schema), custom_metadata={FACTS: json.dumps(parts.facts)})


def values_at(column: pa.ChunkedArray, places: Sequence[int]) -> list[Any]:
    """Return the values of a column at some places; consecutive ones are read at once, which is much faster."""
    if (
        len(places)
        and places[-1] - places[0] == len(places) - 1
        and list(places) == list(range(places[0], places[-1] + 1))
    ):
        return column.slice(places[0], len(places)).to_pylist()
    return [column[place].as_py() for place in places]
