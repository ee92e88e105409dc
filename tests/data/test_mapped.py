"""Files of a cache: an older one is not taken for a new one, and what others do in the folder is no failure."""

import os
import time
from pathlib import Path

import pyarrow as pa
import pytest

from lora_one.data import mapped
from lora_one.data.mapped import Parts, kept, read, write


def version(number):
    """Return a function that computes a table of this version."""
    return lambda: Parts(iter([pa.record_batch({"row": [number]})]), {"version": number})


class Second:
    """The second of two processes, whose first one has found the table of version 2."""

    rank, count = 1, 2

    def gathered(self, value):
        return [{"version": 2}, value]


def test_an_older_file_of_another_node_is_written_again(tmp_path, monkeypatch):
    file = tmp_path / "examples-key.arrow"
    write(file, version(1))
    monkeypatch.setattr(mapped.Processes, "current", Second)
    assert kept(file, "rows read", version(2), valid=False).facts == {"version": 2}
    assert read(file).columns["row"].to_pylist() == [2]


@pytest.mark.parametrize("error", [FileNotFoundError, PermissionError])
def test_an_old_entry_that_cannot_be_deleted_is_left(tmp_path, monkeypatch, error):
    old = tmp_path / "examples-old.arrow"
    old.write_bytes(b"")
    os.utime(old, times=(0, time.time() - 2 * mapped.UNREAD))
    delete = Path.unlink

    def unlink(path, missing_ok=False):
        if path == old:
            raise error(str(path))
        delete(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    write(tmp_path / "examples-new.arrow", version(1))
    assert read(tmp_path / "examples-new.arrow").facts == {"version": 1} and old.exists()
