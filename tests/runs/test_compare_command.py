"""The command of a comparison: stopped by a signal, it continues."""

import os
import signal

import pytest
import yaml

from lora_one.records.folder import RunFolder
from lora_one.runs import compare_command, report_command
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
        "shared_seeds": "fewer runs",
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
        (["--task", "SST-2"], "glue-sst-2"),
    ],
)
def test_a_part_of_a_comparison_does_not_replace_the_whole_report(more, name):
    options = compare_command.parser().parse_args(["comparisons/glue.yaml", *more])
    assert compare_command.default_output(options).as_posix() == f"results/comparisons/{name}"
    choices = (["--only", "LoRA"], ["--only", "LoRA+"], ["model.epochs=3"], ["--test", "model.epochs=3"])
    parsed = [compare_command.parser().parse_intermixed_args(["glue.yaml", *more, *choice]) for choice in choices]
    folders = {compare_command.default_output(one, "runs").as_posix() for one in parsed}
    assert len(folders) == 4 and all(folder.startswith(f"runs/comparisons/{name}-") for folder in folders)
    turned = [["--only", "a", "--only", "b", "results_dir=x"], ["--only", "b", "--only", "a", "results_dir=y"]]
    parsed = [compare_command.parser().parse_intermixed_args(["glue.yaml", *more, *choice]) for choice in turned]
    assert len({compare_command.default_output(one) for one in parsed}) == 1, "the order does not matter"
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


def test_a_task_of_which_no_evaluation_is_run_trains_nothing_and_is_in_the_report(file, tmp_path, capsys):
    content = yaml.safe_load(file.read_text())
    task = {"evaluations": {"MT-Bench": {"not_run": "no judge"}}}
    task["published"] = {"source": "a paper, Table 1", "values": {"MT-Bench": {"LoRA": 5.1}}}
    content["tasks"] = {"chat": task, "code": task}
    file.write_text(yaml.safe_dump(content))
    command = [str(file), "--output", str(tmp_path / "out")]
    assert compare_command.main([*command, "--dry-run"]) == 0
    said = [f"== {name}\nMT-Bench: not run yet: no judge\n" for name in content["tasks"]]
    assert capsys.readouterr().out == "".join(said)
    assert compare_command.main(command) == 0
    assert not (tmp_path / "results").exists()
    report = (tmp_path / "out/report.md").read_text()
    assert report.count("| LoRA   | -     | not run yet | 5.1       |") == 2
    assert report.count("- MT-Bench: not run yet: no judge") == 2
    assert report_command.main([str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/report.md").read_text() == report, "the report made again from the record"
