"""The score of a finished evaluation: value, unit, and the answers only of a share of correct answers."""

import json
from dataclasses import asdict

import pytest

from lora_one.errors import UsageError
from lora_one.reports.scores import score_in
from lora_one.statistics.units import BITS, NATS, POINTS


def write(folder, **report):
    (folder / "metrics.json").write_text(json.dumps({"task": "mine"} | report))
    (folder / "predictions.jsonl").write_text('{"correct": true}\n{"correct": false}\n')


def test_shares_have_answers_and_losses_have_none(tmp_path):
    write(tmp_path, metrics={"accuracy": 0.5, "loss": 1.0}, counts={"total": 4, "unparsed": 1}, remarks={"cut_off": 2})
    share = score_in(tmp_path)
    assert (share["value"], share["metric"], share["unit"]) == (0.5, "accuracy", asdict(POINTS))
    assert share["predictions"] == str(tmp_path / "predictions.jsonl")
    assert (share["answers"], share["unparsed"], share["cut"]) == (4, 1, 2)
    loss = score_in(tmp_path, "loss")
    assert (loss["value"], loss["unit"], loss["predictions"]) == (1.0, asdict(NATS), None)


def test_the_unit_is_the_one_that_the_benchmark_wrote(tmp_path):
    write(tmp_path, metrics={"bits": 1.0}, units={"bits": asdict(BITS)})
    found = score_in(tmp_path)
    assert found["unit"] == asdict(BITS) and found["predictions"] is None and found["answers"] is None


def test_the_metric_of_the_whole_stands_for_an_evaluation(tmp_path):
    """Benchmarks name those of levels, subjects or sets first."""
    write(tmp_path, metrics={"accuracy/Level 1": 1.0, "accuracy": 0.5, "accuracy_official": 0.25})
    assert (score_in(tmp_path)["metric"], score_in(tmp_path)["value"]) == ("accuracy", 0.5)


def test_an_unknown_metric_is_named(tmp_path):
    write(tmp_path, metrics={"loss": 1.0, "loss_stderr": 0.1})
    with pytest.raises(UsageError, match="mine reports no metric los; did you mean loss"):
        score_in(tmp_path, "los")


def test_the_tests_over_questions_use_the_field_of_the_metric(tmp_path):
    """accuracy_official is the share of correct_official; Matthews' coefficient is the share of no field."""
    lines = [{"id": number, "correct": number < 8, "correct_official": number < 2} for number in range(10)]
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    metrics = {"accuracy": 0.8, "accuracy_official": 0.2, "matthews": 0.5}
    (tmp_path / "metrics.json").write_text(json.dumps({"task": "t", "metrics": metrics, "counts": {}}))
    fields = {metric: score_in(tmp_path, metric)["field"] for metric in metrics}
    assert fields == {"accuracy": "correct", "accuracy_official": "correct_official", "matthews": None}
    assert score_in(tmp_path, "matthews")["predictions"] is None
