"""The command of a comparison: stopped by a signal, it continues."""

import os
import signal

import pytest
import yaml

from lora_one.records.folder import RunFolder
from lora_one.runs import compare_command
from lora_one.training.callbacks import AfterStep
from tests.helpers.comparisons import RATE


@pytest.fixture
def file(tmp_path, llama_folder):
    common = ["dataset=arithmetic", "dataset.train_size=24", "dataset.validation_size=8", "wandb.mode=disabled"]
    common += [f"model.name={llama_folder}", "model.real_batch_size=8", "model.per_device_batch_size=8"]
    content = {
        "title": "One method",
        "common": [*common, "dataset.accuracy_examples=0", f"results_dir={tmp_path / 'results'}"],
        "test": ["dataset.data_seed=1"],
        "test_examples": 8,
        "tuning_seeds": [1],
        "seeds": [1],
        "grid": {RATE: [1e-3]},
        "methods": {"LoRA": ["init=lora"]},
    }
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "one.yaml"


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ([], "glue"),
        (["--small"], "glue-small"),
        (["--task", "SST-2", "--only", "LoRA-One", "--only", "rsLoRA"], "glue-sst-2-lora-one-rslora"),
    ],
)
def test_a_part_of_a_comparison_does_not_replace_the_whole_report(more, name):
    options = compare_command.parser().parse_args(["comparisons/glue.yaml", *more])
    assert compare_command.default_output(options).as_posix() == f"results/comparisons/{name}"
    many = compare_command.parser().parse_args(["glue.yaml", *(f"--only=method {number}" for number in range(40))])
    assert len(compare_command.default_output(many).name) < 120


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_resume_point_and_the_same_command_continues(number, file, tmp_path, monkeypatch, capsys):
    command = [str(file), "--output", str(tmp_path / "out")]
    original = AfterStep.on_optimizer_step

    def stop(self, *arguments, **options):
        original(self, *arguments, **options)
        os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(AfterStep, "on_optimizer_step", stop)
        assert compare_command.main(command) == 128 + number
    assert f"stopped by {number.name}" in capsys.readouterr().err
    (record,) = (tmp_path / "results").rglob("run.json")
    folder = RunFolder(record.parent)
    assert folder.read()["status"] == "interrupted"
    assert [point.name for point in folder.checkpoints.iterdir()] == ["checkpoint-1"]
    assert compare_command.main(command) == 0
    assert (tmp_path / "out" / "report.html").exists() and folder.read()["status"] == "finished"
