"""The folder is a function of what can change the adapter, and of nothing else."""

import errno
import fcntl
import json
import os

import pytest

from lora_one.errors import RunError
from lora_one.records.folder import RunFolder, base_of, folder_of, revision_of, run_of
from tests.helpers.runs import run_config


def test_path_is_built_as_documented(tmp_path):
    run = run_config(f"results_dir={tmp_path}", "wandb.name=mine", "wandb.project=p", "seed=3")
    assert folder_of(run, "0123456789") == tmp_path / "p_arithmetic" / "mine-01234567" / "3"


def test_second_process_is_refused(tmp_path):
    with (
        RunFolder(tmp_path).locked(),
        pytest.raises(RunError, match="another process is running"),
        RunFolder(tmp_path).locked(),
    ):
        pass
    with RunFolder(tmp_path).locked():
        pass


def test_a_file_system_without_locks_is_not_another_process(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(RunError, match=r"cannot lock files \(Function not implemented\).*set results_dir"):
        RunFolder(tmp_path).locked().__enter__()


def test_a_name_that_is_too_long_is_to_be_shortened(tmp_path):
    with pytest.raises(RunError, match=r"File name too long.*: shorten wandb.name"):
        RunFolder(tmp_path / ("n" * 300) / "1").locked().__enter__()


def test_partial_files_of_a_killed_process_are_deleted(tmp_path):
    for place in (".adapter.x", "checkpoints/.partial", "epochs/.2.x", "epochs/1"):
        (tmp_path / place).mkdir(parents=True)
    with RunFolder(tmp_path).locked():
        left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert left == [".lock", "checkpoints", "epochs", "epochs/1"]


def test_links_are_removed_and_what_they_lead_to_is_not(tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch" / "file").touch()
    folder = RunFolder(tmp_path / "run")
    with folder.locked():
        folder.checkpoints.symlink_to(tmp_path / "scratch")
        folder.clear()
    assert not folder.checkpoints.exists() and (tmp_path / "scratch" / "file").exists()


def test_broken_run_json_is_not_overwritten(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunError, match=r"is not valid JSON .*move it away"):
        RunFolder(tmp_path).update(status="running")
    assert (tmp_path / "run.json").read_text() == "{"


def test_a_record_that_cannot_be_written_is_unchanged(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    folder.update(status="running")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"run.json cannot be written \(No space left on device\): free disk space"):
        folder.update(status="finished")
    assert folder.read() == {"status": "running"} and len(list(tmp_path.iterdir())) == 1


def test_what_a_run_says_of_its_base(tmp_path):
    """Its revision holds for the model it names alone; its dtype only where none is asked for."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    model = {"name": "some/model", "revision": "abc", "quantization": None, "bf16": True}
    (tmp_path / "run.json").write_text(json.dumps({"config": {"model": model}}))
    assert revision_of(adapter, "some/model") == "abc" and base_of(adapter) == {}
    assert revision_of(adapter, "other/model") is revision_of(None, "some/model") is None
    assert run_of(tmp_path / "gpt2") is None  # the name of a hub model, with a run as the working folder
    (tmp_path / "run.json").write_text(json.dumps({"config": {"model": model | {"quantization": "nf4"}}}))
    assert base_of(adapter) == {"dtype": "bf16", "quantization": "nf4"}
    assert base_of(adapter, "fp32") == {"dtype": "fp32", "quantization": "nf4"}
