"""The folder of a run stands for its adapter or its merged model; what is missing is said with the way out."""

import json
from pathlib import Path

import pytest

from lora_one.errors import UsageError
from lora_one.evaluation.options import EvaluationOptions
from lora_one.evaluation.output import first_difference
from lora_one.evaluation.source import check_present, located


def run_folder(place, *parts, status="finished", base="bundled/tiny"):
    """A run's folder with these of its parts: adapter, weights (of the adapter), merged."""
    place.mkdir(parents=True)
    (place / "run.json").write_text(json.dumps({"status": status}))
    if "adapter" in parts:
        (place / "adapter").mkdir()
        (place / "adapter/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    if "weights" in parts:
        (place / "adapter/adapter_model.safetensors").write_bytes(b"")
    if "merged" in parts:
        (place / "merged_checkpoint").mkdir()
        (place / "merged_checkpoint/config.json").write_text("{}")
        (place / "merged_checkpoint/model.safetensors").write_bytes(b"")
    return place


def test_a_run_stands_for_its_subfolders(tmp_path):
    run = run_folder(tmp_path / "run", "adapter", "weights", "merged")
    assert located(EvaluationOptions(adapter=str(run))).adapter == str(run / "adapter")
    assert located(EvaluationOptions(model_name=str(run))).model_name == str(run / "merged_checkpoint")
    own = EvaluationOptions(adapter=str(run / "adapter"), model_name="bundled/tiny")
    assert located(own) == own
    assert located(EvaluationOptions(rescore="~/predictions.jsonl")).rescore == str(Path.home() / "predictions.jsonl")


@pytest.mark.parametrize(
    ("option", "parts", "words"),
    [
        ("model_name", ["adapter", "weights"], ["no config.json", "pass --adapter=", "scripts/merge.py"]),
        ("model_name", [], ["no config.json", "not finished (status: interrupted)"]),
        ("adapter", ["merged"], ["no adapter_config.json", "pass --model_name="]),
        ("adapter", [], ["no adapter_config.json", "not finished (status: interrupted)"]),
        ("adapter", ["adapter"], ["has no adapter_model.safetensors", "copy the whole folder"]),
    ],
)
def test_what_a_run_lacks(option, parts, words, tmp_path):
    run = run_folder(tmp_path / "run", *parts, status="finished" if parts else "interrupted")
    with pytest.raises(UsageError) as refused:
        located(EvaluationOptions(**{option: str(run)}))
    assert str(refused.value).startswith(f"--{option}={run}") and all(word in str(refused.value) for word in words)


def test_wrong_folders_and_missing_bases(tmp_path):
    run = run_folder(tmp_path / "configuration/42", "adapter", "weights", "merged", base="/no/such/base")
    for options, words in (
        ({"adapter": run / "merged_checkpoint"}, "pass it as --model_name"),
        ({"model_name": run / "adapter"}, "pass it as --adapter"),
        ({"model_name": run.parent}, "contains the runs 42: pass one of them"),
        ({"adapter": run}, "the base of --adapter="),
        ({"model_name": "/no/such/model"}, "--model_name=/no/such/model: there is no such folder"),
    ):
        with pytest.raises(UsageError) as refused:
            check_present(located(EvaluationOptions(**{name: str(path) for name, path in options.items()})))
        assert words in str(refused.value)


def test_the_first_difference_between_two_evaluations_is_named():
    one = {"model": "a", "settings": {"seed": 1, "limit": None}, "fingerprints": {"data_path": "12345678ab"}}
    assert first_difference(one, one) is None
    assert first_difference(one, one | {"model": "b"}) == "--model_name is a there and b here"
    assert "--limit is not given there and 5 here" in first_difference(one, one | {"settings": {"seed": 1, "limit": 5}})
    assert "hash of --data_path's content is 12345678" in first_difference(
        one, one | {"fingerprints": {"data_path": "0"}}
    )
