"""Evaluations before training are made once for a model, a start and a validation set."""

import json

import pytest

from lora_one.errors import RunError
from lora_one.evaluation.validation import Validation
from lora_one.runs.known_evaluations import KnownEvaluations
from tests.helpers.runs import finish, small_run


def test_a_sweep_of_learning_rates_evaluates_base_and_start_once(tmp_path, llama_folder, monkeypatch, capsys):
    """Another rate takes both from the first run; what changes base, start or validation is measured again."""
    calls, original = [], Validation.__call__
    monkeypatch.setattr(Validation, "__call__", lambda self, model: calls.append(1) or original(self, model))
    cache = ("dataset.accuracy_examples=2", "model.epochs=0.1", "model.warmup=0", f"init.cache={tmp_path / 'cache'}")

    def measured(*changes):
        """Return the number of evaluations of a run beside its last one, and its entry in run.json."""
        del calls[:]
        folder = finish(small_run(tmp_path, llama_folder, *cache, *changes))
        return len(calls) - 1, folder.read()["evaluation"]

    first, found = measured()
    assert first == 2 and found["start"] != found["init"]
    number, again = measured("model.learning_rate=1e-2")
    assert number == 0
    assert {stage: again[stage] for stage in ("start", "init")} == {stage: found[stage] for stage in ("start", "init")}
    said = capsys.readouterr().out
    assert " s when it was computed, rank-r energy" in said
    assert "evaluation of the pretrained model read from" in said and "evaluation of the start read from" in said
    assert measured("peft.lora_alpha=4")[0] == 1
    assert measured("init=lora")[0] == 0  # equals the base
    for change in (
        "model.loss=example",
        "dataset.accuracy_examples=3",
        "dataset.max_eval_samples=3",
        "model.bf16=true",
    ):
        number, other = measured(change, "overwrite=true")
        assert number == 2 and other["start"] != found["start"], change


def test_only_what_is_complete_and_finite_is_stored(tmp_path):
    evaluated, key = KnownEvaluations(tmp_path), {"loss": "token"}
    assert evaluated("x", lambda: key, lambda: {"eval_loss": float("inf")}) == {"eval_loss": float("inf")}
    assert not list(tmp_path.rglob("*.json"))
    assert evaluated("x", lambda: key, lambda: {"eval_loss": 1.0}) == {"eval_loss": 1.0}
    assert evaluated("x", lambda: key, lambda: {"eval_loss": 2.0}) == {"eval_loss": 1.0}
    (file,) = tmp_path.rglob("*.json")
    assert json.loads(file.read_text())["key"] == key
    file.write_text("{")
    assert evaluated("x", lambda: key, lambda: {"eval_loss": 3.0}) == {"eval_loss": 3.0}
    assert evaluated("x", lambda: key | {"loss": "example"}, lambda: {"eval_loss": 4.0}) == {"eval_loss": 4.0}


def test_a_folder_that_cannot_be_written_is_one_message(tmp_path):
    (tmp_path / "file").write_text("")
    evaluated = KnownEvaluations(tmp_path / "file")
    with pytest.raises(RunError, match=r"init\.cache=.*file cannot be written"):
        evaluated("x", dict, lambda: {"eval_loss": 1.0})
