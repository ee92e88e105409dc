"""The folder is a function of what can change the adapter, and of nothing else."""

import hashlib
import os
import shutil

import pytest

from lora_one.models import local_folder
from lora_one.records import provenance
from lora_one.records.provenance import config_hash, local_fingerprints
from tests.helpers.runs import run_config


def identity(*overrides):
    run = run_config(*overrides)
    return config_hash(run.published(), local_fingerprints(run.to_dict(), local_folder(run.model.name)))


@pytest.mark.parametrize(
    "override",
    [
        "seed=7",
        "wandb.name=other",
        "wandb.project=other",
        "results_dir=/elsewhere",
        "overwrite=true",
        "dry_run=true",
        "model.saving=true",
        "model.logging_steps=5",
        "model.save_steps=5",
        "wandb.diagnostics_every=5",
        "wandb.curvature_examples=5",
        "wandb.group=other",
    ],
)
def test_hash_ignores_names_outputs_and_logging(override):
    assert identity(override) == identity()


def test_hash_ignores_what_a_dry_run_plans_for():
    assert identity("dry_run=true", "plan.processes=4", "plan.hardware=h100") == identity()


@pytest.mark.parametrize(
    "override",
    [
        "model.learning_rate=1e-4",
        "model.loss=example",
        "peft.lora_r=4",
        "init.stable_gamma=64",
        "init.seed=1",
        "init=default",
        "optimizer=sgd",
        "dataset.train_size=100",
        "model.epochs=2",
        "dataset.train_on_inputs=true",
        "init.shuffle=directions",
    ],
)
def test_hash_includes_everything_that_affects_the_adapter(override):
    assert identity(override) != identity()


def test_a_key_that_came_later_leaves_the_hashes_of_earlier_runs():
    run = run_config()
    before = run.published() | {"dataset": run.to_dict()["dataset"]}
    del before["dataset"]["train_on_inputs"], before["init"]["shuffle"]
    assert config_hash(before, {}) == config_hash(run.published(), {})


def test_local_models_and_data_enter_by_content(tmp_path, llama_folder):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "response": "b"}\n')
    copies = tmp_path / "copies"
    shutil.copytree(llama_folder, copies / "model")
    shutil.copy(rows, copies / "same.jsonl")
    one = ("dataset=json", f"model.name={llama_folder}", f"dataset.path={rows}")
    two = ("dataset=json", f"model.name={copies / 'model'}", f"dataset.path={copies / 'same.jsonl'}")
    assert identity(*one) == identity(*two)
    (copies / "same.jsonl").write_text('{"prompt": "a", "response": "c"}\n')
    assert identity(*one) != identity(*two)


@pytest.fixture
def read(monkeypatch):
    """The files that are hashed."""
    files, original = [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: files.append(file.name) or original(file, kind))
    return files


def test_an_unchanged_file_is_hashed_once(tmp_path, read, monkeypatch):
    monkeypatch.setattr(provenance, "RECENT", 0)
    (tmp_path / "weights").write_text("1" * 1000)
    assert len({provenance.fingerprint(tmp_path) for _ in range(5)}) == 1 and len(read) == 1


def test_a_file_that_has_just_been_written_is_always_hashed(tmp_path, read):
    """A further change may have the same time."""
    (tmp_path / "weights").write_text("1")
    assert len({provenance.fingerprint(tmp_path) for _ in range(3)}) == 1 and len(read) == 3


def test_a_changed_file_of_the_same_size_and_time_has_another_fingerprint(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "RECENT", 0)
    file = tmp_path / "weights"
    file.write_text("1")
    before, times = provenance.fingerprint(tmp_path), file.stat()
    file.write_text("2")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert provenance.fingerprint(tmp_path) != before
