"""Files and folders are written completely or not at all."""

import doctest
import hashlib
import json
import os

import pytest

from lora_one import files
from lora_one.errors import RunError
from lora_one.files import fingerprint, read_lines, whole_files, whole_folder, write_json


def test_json_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "run.json"
    write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_lines_are_chosen_by_their_text_and_an_incomplete_last_one_is_left_out(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"a": 1}\n{"b": 2}\n{"a": 3}\n{"a"')
    assert read_lines(file) == [{"a": 1}, {"b": 2}, {"a": 3}] and read_lines(file, '"a"') == [{"a": 1}, {"a": 3}]
    assert read_lines(tmp_path / "none") == []


def test_an_incomplete_line_may_end_in_a_brace(tmp_path):
    file = tmp_path / "diagnostics.jsonl"
    file.write_text('{"a": {"b": 1}}\n{"a": {"b": 2}')
    assert read_lines(file) == [{"a": {"b": 1}}]


def test_files_below_a_linked_folder_are_part_of_a_fingerprint(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "boolq").symlink_to(tmp_path / "real")
    found = set()
    for text in ("one", "two"):
        (tmp_path / "real" / "train.json").write_text(text)
        found.add(fingerprint(tmp_path / "data", nested=True))
    assert len(found) == 2


def old_folder(tmp_path):
    place = tmp_path / "adapter"
    place.mkdir()
    (place / "old").write_text("old")
    return place


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("how", "step"),
    [(whole_folder, "synced"), (whole_folder, "publish"), (whole_folder, "synced_entry"), (whole_files, "synced")],
)
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_the_old_folder_is_unchanged_after_an_error_in_any_step(how, step, error, tmp_path, monkeypatch):
    place = old_folder(tmp_path)

    def fail(*_):
        raise error

    monkeypatch.setattr(files, step, fail)
    with pytest.raises((RunError, KeyboardInterrupt)), how(place) as folder:
        (folder / "old").write_text("new")
    assert (place / "old").read_text() == "old" and tree(tmp_path) == ["adapter", "adapter/old"]


def test_a_folder_is_replaced(tmp_path):
    place = old_folder(tmp_path)
    with whole_folder(place) as folder:
        (folder / "new").touch()
        assert tree(place) == ["old"]
    assert tree(tmp_path) == ["adapter", "adapter/new"]


def test_files_are_replaced_and_others_stay(tmp_path, monkeypatch):
    place = old_folder(tmp_path)
    (place / "mine").write_text("mine")
    for path in (place, tmp_path / "new/folder"):
        with whole_files(path) as folder:
            (folder / "old").write_text("new")
            (folder / "part").mkdir()
            (folder / "part/one").touch()
    assert tree(place) == ["mine", "old", "part", "part/one"] and (place / "old").read_text() == "new"
    assert tree(tmp_path / "new") == ["folder", "folder/old", "folder/part", "folder/part/one"]
    with whole_files(place) as folder:  # again
        (folder / "part").mkdir()
        (folder / "part/one").write_text("1")
    assert (place / "part/one").read_text() == "1"


@pytest.mark.parametrize("how", [whole_folder, whole_files])
def test_a_file_at_the_place_of_a_folder_stays(how, tmp_path):
    (tmp_path / "adapter").write_text("mine")
    with pytest.raises(RunError, match="cannot be written"), how(tmp_path / "adapter") as folder:
        (folder / "new").touch()
    assert (tmp_path / "adapter").read_text() == "mine" and tree(tmp_path) == ["adapter"]


def test_doctests():
    assert doctest.testmod(files).failed == 0


@pytest.fixture
def read(monkeypatch):
    """The files that are hashed."""
    files, original = [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: files.append(file.name) or original(file, kind))
    return files


def test_an_unchanged_file_is_hashed_once(tmp_path, read, monkeypatch):
    monkeypatch.setattr(files, "RECENT", 0)
    (tmp_path / "weights").write_text("1" * 1000)
    assert len({files.fingerprint(tmp_path) for _ in range(5)}) == 1 and len(read) == 1


def test_a_file_that_has_just_been_written_is_always_hashed(tmp_path, read):
    """A further change may have the same time."""
    (tmp_path / "weights").write_text("1")
    assert len({files.fingerprint(tmp_path) for _ in range(3)}) == 1 and len(read) == 3


def test_a_changed_file_of_the_same_size_and_time_has_another_fingerprint(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "RECENT", 0)
    file = tmp_path / "weights"
    file.write_text("1")
    before, times = files.fingerprint(tmp_path), file.stat()
    file.write_text("2")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert files.fingerprint(tmp_path) != before
