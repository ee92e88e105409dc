"""The closing summary: losses and accuracy of each stage, memory, and a command that fits data set and model."""

import dataclasses
import shlex

import pytest

from lora_one import invocation
from lora_one.datasets import DATASETS
from lora_one.evaluation import BENCHMARKS
from lora_one.records.folder import RunFolder
from lora_one.runs import summary
from lora_one.runs.summary import curvature_line, next_command, print_summary, result_lines
from tests.helpers.paths import ROOT
from tests.helpers.runs import finish, run_config, small_run

ADAPTER, MERGED = {"adapter": "adapter"}, {"merged_checkpoint": "merged_checkpoint"}


def command(tmp_path, dataset, artifacts=ADAPTER, path=None):
    run = run_config("dataset=arithmetic")
    run = dataclasses.replace(run, dataset=dataclasses.replace(run.dataset, name=dataset, path=path))
    return next_command(run, RunFolder(tmp_path), artifacts)


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_the_next_command_is_a_benchmark_that_exists_or_a_merge(name, tmp_path):
    found = shlex.split(command(tmp_path, name))
    assert found[0] == "python" and (ROOT / found[1]).exists()
    benchmark = (DATASETS[name].evaluation or "").partition(" ")[0]
    assert benchmark in BENCHMARKS or found[1:] == ["scripts/merge.py", str(tmp_path)]
    if benchmark:
        assert found[1] == f"eval/eval_{benchmark}.py" and f"--adapter={tmp_path / 'adapter'}" in found
        assert f"--model_name={tmp_path / 'merged_checkpoint'}" in shlex.split(command(tmp_path, name, MERGED))
    else:
        assert command(tmp_path, name, MERGED) is None


def test_each_set_is_scored_by_its_own_benchmark(tmp_path):
    assert "eval_glue.py --dataset=cola " in command(tmp_path, "cola")
    assert "eval_gsm8k.py " in command(tmp_path, "meta_math") and "eval_humaneval.py " in command(
        tmp_path, "codefeedback"
    )
    assert "eval_commonsense.py " in command(tmp_path, "commonsense_reasoning")


def test_local_data_is_passed_on_as_the_folder_of_its_splits(tmp_path):
    (tmp_path / "train.tsv").touch()
    asked = command(tmp_path, "cola", path=str(tmp_path / "train.tsv"))
    assert "--data_path='<file or folder of its test split>'" in asked
    (tmp_path / "dev.tsv").touch()
    for path in (tmp_path, tmp_path / "train.tsv"):
        assert command(tmp_path, "cola", path=str(path)).endswith(f"--data_path={tmp_path}")
    assert "--data_path" not in command(tmp_path, "cola")


def test_without_a_checkout_the_installed_command_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(invocation, "__file__", str(tmp_path / "lora_one" / "invocation.py"))
    assert command(tmp_path, "gsm8k").startswith("lora-one-eval gsm8k --adapter=")


def test_a_run_measures_and_prints_every_stage(tmp_path, llama_folder, capsys):
    run = small_run(tmp_path, llama_folder, "dataset.accuracy_examples=4")
    folder = finish(run)
    record, said = folder.read(), capsys.readouterr().out
    for stage in ("start", "init", "final"):
        measured = record["evaluation"][stage]
        assert measured["eval_accuracy_n"] == 4 and f"{measured['eval_loss']:.4f}" in said
    assert record["peak_memory_bytes"] > 1e7 and "peak memory 0." in said
    assert "exact match" in said and "n = 4)" in said and "+-" not in said


def test_the_base_is_measured_without_generated_answers_too(tmp_path, llama_folder):
    evaluations = finish(small_run(tmp_path, llama_folder)).read()["evaluation"]
    assert list(evaluations) == ["start", "init", "final"]
    assert all(list(found) == ["eval_loss"] for found in evaluations.values())


def test_a_head_has_an_accuracy_and_an_unmeasured_stage_no_row():
    measured = {"eval_loss": 0.5, "eval_accuracy": 0.75, "eval_accuracy_stderr": 0.1, "eval_accuracy_n": 8}
    record = {"evaluation": {"start": measured, "final": {"eval_loss": 0.25}}, "train": {"steps": 3}}
    run = run_config("dataset=arithmetic")
    run = dataclasses.replace(run, dataset=dataclasses.replace(run.dataset, name="cola"))
    header, start, final = result_lines(run, record)
    assert header.split() == ["validation", "loss", "accuracy"]
    assert start.startswith("pretrained") and "75.00 %" in start and "n = 8" in start
    assert final.split() == ["after", "training", "0.2500"]


def test_only_the_first_process_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(summary.Processes, "current", lambda: summary.Processes(1, 2))
    print_summary(run_config(), RunFolder(tmp_path))
    assert capsys.readouterr().out == ""


def test_the_line_of_the_curvature_says_where_it_did_not_converge():
    curvature = {"largest_eigenvalue": 0.5, "error": 0.004, "products": 9, "converged": True, "examples": 4}
    curvature |= {"layers": {}, "layers_not_converged": {}}
    assert curvature_line(curvature).endswith("in the adapters is 0.5 (4 training examples)")
    worse = curvature | {"error": 0.1, "products": 100, "converged": False}
    assert curvature_line(worse).endswith("; not converged: its error may be 0.1 after 100 products")
    layers = {"layers": {"a": 1.0, "b": 2.0}, "layers_not_converged": {"b": 0.2}}
    assert curvature_line(curvature | layers).endswith("; 1 of 2 layers not converged")
