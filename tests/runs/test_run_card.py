"""The model card of a run."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lora_one.adaptation import checkpoints
from lora_one.runs.run_card import results
from tests.helpers.runs import finish, small_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return finish(small_run(tmp_path_factory.mktemp("results"), "bundled/tiny", "init=pissa", "model.epochs=1"))


def test_the_card_of_a_run_is_filled(folder):
    text = (folder.adapter / "README.md").read_text()
    record = json.loads(folder.run_json.read_text())
    for known in ("pissa", "`arithmetic`", "learning rate 0.005", record["config_hash"], "lora_r: 8", "- torch: "):
        assert known in text, known
    loss = record["evaluation"]["final"]["eval_loss"]
    assert f"| after training | {loss:.4g} |" in text
    assert "More Information Needed" not in text and "results_dir" not in text
    assert ModelCard.load(folder.adapter / "README.md").data.library_name == "peft"


def test_the_code_of_the_card_loads_the_adapter(folder):
    code = (folder.adapter / "README.md").read_text().split("```python\n")[1].split("```")[0]
    found = {}
    exec(code.replace("<this folder, or its name on the hub>", str(folder.adapter)), found)
    ids = torch.arange(3, 20).reshape(1, -1)
    base = AutoModelForCausalLM.from_pretrained(found["base"].config._name_or_path)
    assert isinstance(found["model"], PeftModel)
    with torch.no_grad():
        assert not torch.equal(found["model"](ids).logits, base(ids).logits)


def test_weights_and_configuration_do_not_depend_on_the_card(tmp_path, monkeypatch):
    """Bit for bit what PEFT and the conversion write."""
    one = finish(small_run(tmp_path / "one", "bundled/tiny", "init=lora_ga"))
    monkeypatch.setattr(checkpoints, "write_card", lambda folder, facts: None)
    monkeypatch.setattr("lora_one.runs.saving.write_card", lambda folder, facts: None)
    two = finish(small_run(tmp_path / "two", "bundled/tiny", "init=lora_ga"))
    assert "Model Card for Model ID" in (two.adapter / "README.md").read_text(), "PEFT's template"
    same = "adapter_model.safetensors"
    assert (one.adapter / same).read_bytes() == (two.adapter / same).read_bytes()
    configs = [json.loads((run.adapter / "adapter_config.json").read_text()) for run in (one, two)]
    for config in configs:
        config["target_modules"] = sorted(config["target_modules"])
    assert configs[0] == configs[1]


def test_results_have_a_row_for_each_stage_that_was_measured():
    rows = results({"start": {"eval_loss": 2.0}, "final": {"eval_loss": 1.0, "eval_accuracy": 0.5}})
    assert rows == [
        ["", "validation loss", "validation accuracy"],
        ["pretrained", "2", ""],
        ["after training", "1", "0.5"],
    ]
    assert results({}) == []
