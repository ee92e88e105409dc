"""The folder is a function of what can change the adapter, and of nothing else."""

import os
import shutil
import sys

import pytest

from lora_one.models import local_folder
from lora_one.records.provenance import config_hash, local_fingerprints, machine, provenance, source_fingerprint
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
    run = run_config("dataset=alpaca")
    before = run.published() | {"dataset": run.to_dict()["dataset"]}
    del before["dataset"]["train_on_inputs"], before["dataset"]["rows"], before["init"]["shuffle"]
    assert config_hash(before, {}) == config_hash(run.published(), {})


def test_provenance_says_which_code_ran_where(monkeypatch):
    found = provenance({})
    assert found["code"] == source_fingerprint() and f"of {os.cpu_count()} cores, on " in found["machine"]
    monkeypatch.delitem(sys.modules, "torch")
    assert machine().endswith(f"{os.cpu_count()} cores")  # an evaluation on a server does not import torch


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
