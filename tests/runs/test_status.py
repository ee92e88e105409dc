"""What a run remembers of its start: the commit of its model, where that lies, how it is measured, its W&B run."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_one.errors import RunError
from lora_one.runs import experiment, merge_command
from lora_one.runs.saving import merge_run
from tests.helpers.hub import HubModel
from tests.helpers.runs import finish, small_run, stop_at

OLD, NEW = "1" * 40, "2" * 40
RESUMED = ("model.save_steps=2", "model.epochs=1", "init=pissa")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A model of the hub with two commits."""
    model = HubModel(tmp_path / "hub", monkeypatch)
    model.commit(OLD)
    file = model.commit(NEW) / "model.safetensors"
    weights = {name: weight * 1.5 if "down_proj" in name else weight for name, weight in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    return model


def weights_of(folder):
    return load_file(folder.merged / "model.safetensors")


@pytest.mark.filterwarnings("ignore:Could not find a config file")  # PEFT asks the hub
def test_a_run_stays_on_the_commit_of_its_hub_model(hub, tmp_path, monkeypatch):
    """It resumes on the commit that it began with, and is merged with it, although the branch has moved on."""
    hub.move(OLD)
    straight = finish(small_run(tmp_path / "straight", "some/model", *RESUMED, "model.saving=true"))
    run = small_run(tmp_path / "stopped", "some/model", *RESUMED)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 3)
        experiment.execute(run)
    hub.move(NEW)
    folder = finish(run)
    assert folder.read()["provenance"]["model_commit"] == OLD
    assert OLD in (folder.adapter / "README.md").read_text()
    merge_run(folder)
    assert all(torch.equal(value, weights_of(straight)[name]) for name, value in weights_of(folder).items())
    other = finish(small_run(tmp_path / "other", "some/model", *RESUMED))
    assert other.read()["provenance"]["model_commit"] == NEW


def test_a_run_whose_record_was_moved_away_starts_again(tmp_path, llama_folder):
    run = small_run(tmp_path, llama_folder, *RESUMED)
    before = finish(run)
    record = before.read()
    before.run_json.unlink()
    after = finish(run)
    assert after.read()["status"] == "finished" and after.read()["evaluation"] == record["evaluation"]


def test_a_run_is_merged_with_its_local_model_where_that_is_now(tmp_path, llama_folder, capsys):
    model = shutil.copytree(llama_folder, tmp_path / "model")
    folder = finish(small_run(tmp_path, model, "model.epochs=0.5", "init=lora", "model.saving=true"))
    merged = weights_of(folder)
    model.rename(tmp_path / "moved")
    shutil.rmtree(folder.merged)
    with pytest.raises(RunError, match=r"the model of .* is not in .*/model: merge with scripts/merge.py --model_name"):
        merge_run(folder)
    assert merge_command.main([str(folder.path), f"--model_name={tmp_path / 'moved'}"]) == 0
    assert weights_of(folder).keys() == merged.keys()
    shutil.rmtree(folder.merged)
    finish(small_run(tmp_path, tmp_path / "moved", "model.epochs=0.5", "init=lora", "model.saving=true"))
    assert all(torch.equal(value, merged[name]) for name, value in weights_of(folder).items())
    (tmp_path / "moved" / "config.json").write_text("{}")
    assert merge_command.main([str(folder.path), f"--model_name={tmp_path / 'moved'}"]) == 1
    assert "its files differ" in capsys.readouterr().err


def test_a_finished_run_says_what_the_command_asks_in_vain(tmp_path, llama_folder, capsys):
    run = small_run(tmp_path, llama_folder, "model.epochs=0.5", "init=lora")
    finish(run)
    finish(run)
    assert "note:" not in capsys.readouterr().out
    changes = ("model.keep_epochs=true", "dataset.accuracy_examples=4", "dataset.max_new_tokens=4")
    finish(small_run(tmp_path, llama_folder, "model.epochs=0.5", "init=lora", *changes))
    wanted = "dataset.accuracy_examples=0, dataset.max_new_tokens=8, model.keep_epochs=False"
    assert f"note: it ran with {wanted}, which this command does not change" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:W&B could not start online")
def test_a_run_that_wandb_starts_offline_has_the_id_of_that_run(tmp_path, llama_folder, monkeypatch):
    import wandb

    init = wandb.init

    def without_server(mode, **options):
        if mode == "online":
            raise wandb.errors.CommError("no server")
        return init(mode=mode, **options)

    monkeypatch.setattr(wandb, "init", without_server)
    run = small_run(tmp_path, llama_folder, "model.epochs=0.5", "init=lora", "wandb.mode=online")
    folder = finish(run)
    (place,) = folder.path.glob("wandb/offline-run-*")
    assert place.name.endswith(folder.read()["wandb_id"])
