"""The score of a finished evaluation: value, unit, and the answers only of a share of correct answers."""

import json
from dataclasses import asdict

import pytest

from lora_one.errors import UsageError
from lora_one.reports.scores import score_in
from lora_one.statistics.units import BITS, NATS, POINTS


def write(folder, **report):
    (folder / "metrics.json").write_text(json.dumps({"task": "mine"} | report))
    (folder / "predictions.jsonl").write_text("{}\n")


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


def test_an_unknown_metric_is_named(tmp_path):
    write(tmp_path, metrics={"loss": 1.0, "loss_stderr": 0.1})
    with pytest.raises(UsageError, match="mine reports no metric los; did you mean loss"):
        score_in(tmp_path, "los")
