"""What an evaluation prints: an interval for a share of all examples, the standard error of everything else.

And what tells it from another evaluation.
"""

import json
from pathlib import Path

from lora_one.evaluation.options import EvaluationOptions
from lora_one.evaluation.output import data_fingerprints, first_difference, output_folder, show
from lora_one.records.folder import RunFolder


def test_each_uncertainty_is_named(capsys):
    metrics = {"accuracy": 0.0, "accuracy_stderr": 0.0, "matthews": 0.25, "matthews_stderr": 0.125}
    show("glue", {"metrics": metrics, "counts": {"correct": 0, "total": 200}})
    accuracy, matthews, counts = capsys.readouterr().out.splitlines()
    assert accuracy == "glue accuracy: 0.00 % (95 % interval 0.00 to 1.88, n = 200)"
    assert matthews == "glue matthews: 25.00 % (standard error 12.50)"
    assert "total 200" in counts


def test_a_loss_is_not_printed_as_a_share(capsys):
    bits = {"name": "bits", "value_name": "bits", "scale": 1, "digits": 3, "higher": False}
    metrics = {"loss": 2.5, "loss_stderr": 0.03125, "rate": 1.25}
    show("mine", {"metrics": metrics, "units": {"rate": bits}, "counts": {"documents": 3}})
    assert capsys.readouterr().out.splitlines() == [
        "mine loss: 2.5000 nats (standard error 0.0312)",
        "mine rate: 1.250 bits",
        "documents 3",
    ]


def test_another_base_below_the_same_adapter_is_another_evaluation(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder in (base, adapter):
        folder.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    (base / "model.safetensors").write_text("one")
    options = EvaluationOptions(adapter=str(adapter))
    before = {"model": options.model, "settings": {}, "fingerprints": data_fingerprints(options)}
    (base / "model.safetensors").write_text("other")
    after = before | {"fingerprints": data_fingerprints(options)}
    assert first_difference(before, before) is None
    assert "the hash of the base's content" in first_difference(before, after)
    del before["fingerprints"]["base"]  # an earlier version did not know it
    assert first_difference(before, after) is None


def test_a_copy_of_an_adapter_outside_its_run_is_evaluated_on_another_base(tmp_path):
    """Its run says that the base is quantised; what is not known of an adapter from elsewhere is as stored."""
    run = RunFolder(tmp_path / "run")
    run.update(config={"model": {"name": "org/base", "revision": None, "quantization": "nf4", "bf16": True}})
    for folder in (run.adapter, tmp_path / "copy"):
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    one, other = ({"model": str(f), "settings": {"adapter": str(f)}} for f in (run.adapter, tmp_path / "copy"))
    for identity in (one, other):
        identity["fingerprints"] = data_fingerprints(EvaluationOptions(adapter=identity["model"]))
    assert first_difference(one, other) == "the loading of the base is nf4, bf16 there and as stored here"


def test_an_adapter_on_the_model_of_a_run_is_not_that_run_s(tmp_path):
    """Its results would replace those of the run itself."""
    run = RunFolder(tmp_path / "run")
    run.update(status="finished")
    for folder in (run.merged, tmp_path / "adapter"):
        folder.mkdir()
    alone = EvaluationOptions(model_name=str(run.merged))
    assert output_folder("gsm8k", alone) == run.path / "eval" / "gsm8k"
    adapted = EvaluationOptions(model_name=str(run.merged), adapter=str(tmp_path / "adapter"))
    assert output_folder("gsm8k", adapted) == Path("eval_results/adapter/gsm8k")


def test_other_paths_to_the_same_files_are_the_same_evaluation(tmp_path, monkeypatch):
    """Written relatively or absolutely, or moved: the content decides. A model of the hub is known by its name."""
    (tmp_path / "run").mkdir()
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "run" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    monkeypatch.chdir(tmp_path)

    def identity(**given):
        options = EvaluationOptions(**given)
        return {"model": options.model, "settings": options.settings, "fingerprints": data_fingerprints(options)}

    relative = identity(adapter="run", data_path="rows.jsonl")
    absolute = identity(adapter=str(tmp_path / "run"), data_path=str(tmp_path / "rows.jsonl"))
    assert first_difference(relative, absolute) is None
    on_other = identity(adapter="run", data_path="rows.jsonl", model_name="org/other")
    assert first_difference(relative, on_other) == "--model_name is not given there and org/other here"
    (tmp_path / "run" / "adapter_model.safetensors").write_text("other weights")
    assert "hash of --adapter's content" in first_difference(relative, identity(adapter="run", data_path="rows.jsonl"))
