"""A report on the runs of a results folder."""

import json
from collections import Counter
from pathlib import Path

import pytest

from lora_one.errors import UsageError
from lora_one.reports.pages import write_report
from lora_one.reports.runs_record import records_of_runs


def write_run(results, configuration, seed, loss, accuracy=None, task="p_data", rate=1e-3, scores=None, **changes):
    """Write the run.json and metrics.jsonl of a finished run, and its evaluations."""
    folder = results / task / configuration / str(seed)
    folder.mkdir(parents=True)
    final = {"eval_loss": loss} | ({"eval_accuracy": accuracy} if accuracy is not None else {})
    record = {
        "status": "finished",
        "config": {
            "seed": seed,
            "dataset": {"name": "data"},
            "model": {
                "name": "m",
                "revision": None,
                "learning_rate": rate,
                "epochs": 1,
                "real_batch_size": 8,
                "loss": "token",
            },
            "peft": {"use_peft": True, "lora_r": 8, "lora_alpha": 16.0},
            "optimizer": {"name": "adamw"},
        },
        "config_hash": configuration,
        "provenance": {"versions": {"torch": "2"}, "git_commit": "c", "fingerprints": {}},
        "data": {"train": {"whole": 10, "shortened": 0}},
        "trainable_parameters": 5,
        "init": {"method": "LoRA", "seconds": 1.0},
        "evaluation": {"final": final},
        "train": {"steps": 2, "seconds": 3.0, "tokens": 90},
    }
    (folder / "run.json").write_text(json.dumps(record | changes))
    lines = [{"step": 0, "eval_loss": 2.0}, {"step": 2, "epoch": 1.0, "eval_loss": loss}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"st')  # a crash may leave an incomplete line
    for name, (value, answers) in (scores or {}).items():
        place = folder / "eval" / name
        place.mkdir(parents=True)
        (place / "metrics.json").write_text(json.dumps({"metrics": {"accuracy": value}}))
        lines = [{"id": number, "correct": right} for number, right in enumerate(answers)]
        (place / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture()
def results(tmp_path):
    """Two configurations with three seeds each, a failed and an unfinished run."""
    for seed, noise in enumerate([0.0, 0.01, 0.03]):
        answers = [number < 60 for number in range(100)]
        scores = {"gsm8k": (0.6, answers)}
        write_run(tmp_path, "LoRA-a-11111111", seed, 1.0 + noise, 0.5, scores=scores)
        write_run(tmp_path, "LoRA-b-22222222", seed, 0.8 + noise**2, 0.7, rate=1e-2, scores=scores)
    write_run(tmp_path, "LoRA-b-22222222", 9, 0.0, status="failed", error="RunError: the loss became nan")
    write_run(tmp_path, "LoRA-b-22222222", 10, 0.0, status="running", error="Interrupted: SIGTERM")  # of its last start
    return tmp_path


def test_configurations_are_rows_and_seeds_their_runs(results):
    (record,) = records_of_runs(results).values()
    first, second = record["rows"]
    assert (first["method"], first["seeds"], second["seeds"], second["failed_runs"]) == ("LoRA-a-11111111", 3, 3, 2)
    assert first["validation_loss_mean"] == pytest.approx(1.0 + 0.04 / 3)
    assert first["gsm8k_mean"] == pytest.approx(0.6) and second["validation accuracy_mean"] == pytest.approx(0.7)
    assert first["note"] == "model.learning_rate=0.001"
    assert second["note"] == (
        "model.learning_rate=0.01; without a result, 2 of 5 runs: not finished, its status is running; "
        "RunError: the loss became nan"
    )
    assert record["runs"][0]["history"] == (
        {"epoch": 0.0, "loss": 2.0, "accuracy": None},
        {"epoch": 1.0, "loss": 1.0, "accuracy": None},
    )


def test_a_baseline_gives_verdicts_on_the_validation_loss_and_the_evaluations(results, tmp_path):
    records = records_of_runs(results, "LoRA-a")
    figures = {part["figure"]: part for part in records[""]["findings"]}
    assert set(figures) == {"validation accuracy", "gsm8k", "validation loss"}
    (verdict,) = figures["validation loss"]["verdicts"]
    assert verdict["outcome"] == "better" and verdict["baseline"] == "LoRA-a-11111111"
    (entry,) = figures["gsm8k"]["questions"]
    assert entry["questions"] == 100 and entry["difference"] == 0
    text = write_report("Runs", records, tmp_path / "report").read_text()
    assert "LoRA-b-22222222 is better than LoRA-a-11111111" in text and "test loss" not in text


def test_answers_are_read_only_for_the_tests_against_a_baseline(results):
    """Ten thousand runs have gigabytes of them."""
    for file in results.rglob("predictions.jsonl"):
        file.write_text("not JSON}\n")
    (record,) = records_of_runs(results).values()
    assert record["rows"][0]["gsm8k_mean"] == pytest.approx(0.6)
    with pytest.raises(ValueError):
        records_of_runs(results, "LoRA-a")


def test_a_configuration_with_seeds_without_a_result_is_not_called_better(results):
    """As --runs does: seeds that were killed, failed or were not evaluated may be its bad ones."""
    for seed in (9, 10):
        write_run(results, "LoRA-a-11111111", seed, 1.0)
    figures = {part["figure"]: part for part in records_of_runs(results, "LoRA-a")[""]["findings"]}
    (verdict,) = figures["validation loss"]["verdicts"]
    assert verdict["outcome"] == "not tested" and "2 seeds of LoRA-b-22222222" in verdict["sentence"]
    for seed in (20, 21, 22):
        write_run(results, "LoRA-b-22222222", seed, 0.8, scores={"other": (0.9, [True] * 10)})
        write_run(results, "LoRA-a-11111111", seed, 1.0, scores={"other": (0.5 + 0.01 * (seed - 20) ** 2, [True] * 10)})
    write_run(results, "LoRA-a-11111111", 23, 1.0, scores={"other": (0.5, [True] * 10)})
    write_run(results, "LoRA-b-22222222", 23, 0.8)  # finished, not evaluated
    figures = {part["figure"]: part for part in records_of_runs(results, "LoRA-a")[""]["findings"]}
    (verdict,) = figures["other"]["verdicts"]
    assert verdict["outcome"] == "not tested" and "1 seed of LoRA-b-22222222" in verdict["sentence"]


def test_configurations_without_any_result_count_in_the_correction(results):
    (alone,) = records_of_runs(results, "LoRA-a")[""]["findings"][-1]["verdicts"]
    write_run(results, "LoRA-c-33333333", 0, 0.0, status="failed", error="RunError: the loss became nan")
    (verdict,) = records_of_runs(results, "LoRA-a")[""]["findings"][-1]["verdicts"]
    assert verdict["p"] == pytest.approx(2 * alone["p"])


def test_the_test_loss_of_a_comparison_is_no_evaluation_and_one_with_a_similar_name_is(results):
    for name, task in (("loss-0123abcd", "loss"), ("loss-on-a-story-0123abcd", "text")):
        place = results / "p_data/LoRA-a-11111111/0/eval" / name
        place.mkdir(parents=True)
        (place / "metrics.json").write_text(json.dumps({"task": task, "metrics": {"loss": 1.5}}))
    run = records_of_runs(results)[""]["runs"][0]
    assert set(run["scores"]) == {"validation accuracy", "gsm8k", "loss-on-a-story-0123abcd"}


def test_each_file_of_a_run_is_read_once(results, monkeypatch):
    read, original = Counter(), Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path: read.update([path.name]) or original(path))
    records_of_runs(results)
    assert read["run.json"] == 8 and read["metrics.jsonl"] == read["metrics.json"] == 6


def test_each_data_set_is_a_task(results):
    write_run(results, "LoRA-a-33333333", 1, 1.0, task="p_other")
    assert set(records_of_runs(results)) == {"p_data", "p_other"}


def test_no_run_and_an_unknown_baseline_are_refused(results, tmp_path):
    with pytest.raises(UsageError, match="contains no run"):
        records_of_runs(tmp_path / "nothing")
    with pytest.raises(UsageError, match=r"--baseline=LoRA-c is not a configuration.*LoRA-a-11111111"):
        records_of_runs(results, "LoRA-c")


def test_evaluations_with_other_settings_are_noted(results):
    file = results / "p_data/LoRA-b-22222222/1/eval/gsm8k/metrics.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"settings": {"limit": 5, "adapter": "x"}}))
    (record,) = records_of_runs(results).values()
    one, other = (row["note"] for row in record["rows"])
    assert "settings" not in one and "gsm8k: not with the same settings: --limit is None there and 5 here" in other
    assert not any("settings" in score for run in record["runs"] for score in run["scores"].values())
