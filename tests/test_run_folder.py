"""The folder is a function of what can change the adapter, and of nothing else."""

import json
import shutil

import pytest
from conftest import run_config

from lora_one.errors import RunError
from lora_one.files import write_json
from lora_one.models import local_folder
from lora_one.records.folder import RunFolder, folder_of
from lora_one.records.provenance import config_hash, local_fingerprints


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
        "wandb.group=other",
    ],
)
def test_what_only_names_writes_or_watches_does_not_enter(override):
    assert identity(override) == identity()


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
    ],
)
def test_what_can_change_the_adapter_enters(override):
    assert identity(override) != identity()


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


def test_what_a_killed_process_left_half_written_goes(tmp_path):
    for place in (".adapter.x", "checkpoints/.partial", "epochs/.2.x", "epochs/1"):
        (tmp_path / place).mkdir(parents=True)
    with RunFolder(tmp_path).locked():
        left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert left == [".lock", "checkpoints", "epochs", "epochs/1"]


def test_json_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "run.json"
    write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_broken_run_json_is_not_overwritten(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunError, match="not readable JSON"):
        RunFolder(tmp_path).update(status="running")
    assert (tmp_path / "run.json").read_text() == "{"
