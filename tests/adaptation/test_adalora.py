"""AdaLoRA: its penalty beside our loss, its budget, its saved form, and that it resumes."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from lora_one.adaptation import adalora
from lora_one.adaptation.layers import lora_layers
from lora_one.files import read_lines
from lora_one.records.folder import RunFolder
from lora_one.runs import experiment
from lora_one.runs.saving import merge_run
from tests.helpers.models import folder_of, random_llama
from tests.helpers.runs import finish, run_config, small_run, stop_at

RUN = (
    "peft=adalora",
    "peft.lora_r=2",
    "model.max_length=64",
    "model.learning_rate=5e-2",
)
RUN = (*RUN, "model.epochs=4", "model.saving=true", "peft.lora_dropout=0.1")


@pytest.fixture
def base(tokenizer, tmp_path):
    return folder_of(random_llama(len(tokenizer)), tokenizer, tmp_path / "base")


def wrapped(**changes):
    peft = run_config("peft=adalora", "peft.lora_r=4").peft
    return adalora.wrap_adalora(random_llama(**changes), peft, "fp32", 40, seed=3)


def test_the_penalty_is_what_peft_adds_to_a_loss_of_its_own():
    model = wrapped().train()
    ids = torch.tensor([[5, 9, 7, 33, 2, 8]])
    with torch.no_grad():
        output = model(input_ids=ids, labels=ids)
        alone = cross_entropy(output.logits[0, :-1], ids[0, 1:])
        assert adalora.penalty(model).item() == pytest.approx((output.loss - alone).item(), rel=1e-4)


def test_the_logged_loss_is_without_the_penalty_which_is_trained(base, tmp_path, monkeypatch):
    """At the first step the model is the base, so its loss is that of LoRA, and the penalty alone has a gradient."""
    changes = ("model.epochs=0.34", "model.logging_steps=1", "model.per_device_batch_size=4")
    runs = {"LoRA": "init=lora", "AdaLoRA": "peft=adalora"}
    folders = {name: finish(small_run(tmp_path / name, base, *changes, chosen)) for name, chosen in runs.items()}
    monkeypatch.setattr(adalora, "ORTHOGONAL", 0.0)
    folders["no penalty"] = finish(small_run(tmp_path / "none", base, *changes, "peft=adalora"))
    first = [read_lines(folder.metrics, '"loss"')[0]["loss"] for folder in folders.values()]
    assert first == pytest.approx([first[0]] * 3, rel=1e-5)
    trained = [load_file(folders[name].adapter / "adapter_model.safetensors") for name in ("AdaLoRA", "no penalty")]
    assert not all(torch.allclose(trained[0][name], trained[1][name]) for name in trained[0])


def test_starts_as_the_base_and_is_reproducible():
    ids = torch.tensor([[5, 9, 7, 33]])
    one, same = wrapped(), wrapped()
    with torch.no_grad():
        assert torch.equal(one(input_ids=ids).logits, random_llama()(input_ids=ids).logits)
    pairs = zip(lora_layers(one).values(), lora_layers(same).values(), strict=True)
    assert all(torch.equal(a.lora_A["default"], b.lora_A["default"]) for a, b in pairs)
    assert {layer.r["default"] for layer in lora_layers(one).values()} == {6}, "half as much again at first"


def test_rank_count_is_not_trained_beside_a_16_bit_base():
    peft = run_config("peft=adalora", "peft.lora_r=4").peft
    model = adalora.wrap_adalora(random_llama().bfloat16(), peft, "fp32", 40, seed=3)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    assert {layer.ranknum["default"].dtype for layer in lora_layers(model).values()} == {torch.float32}


def test_the_budget_falls_to_the_rank_and_the_adapter_is_plain_lora_of_the_same_function(base, tmp_path):
    folder = finish(small_run(tmp_path, base, *RUN))
    record = folder.read()
    assert record["init"]["method"] == "AdaLoRA" and folder.path.parent.name.startswith("AdaLoRA-r2")
    config = json.loads((folder.adapter / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 3)
    factors = load_file(folder.adapter / "adapter_model.safetensors")
    columns = [tensor.norm(dim=0) > 0 for name, tensor in factors.items() if ".lora_B." in name]
    assert sum(int(used.sum()) for used in columns) <= 2 * len(columns), "on average the rank asked for"
    assert len({int(used.sum()) for used in columns}) > 1, "shared out unevenly"
    point = next(folder.checkpoints.glob("checkpoint-*"))
    assert (point / "adalora.safetensors").exists()
    trained = adalora.wrap_adalora(
        AutoModelForCausalLM.from_pretrained(base), run_config(*RUN[:2]).peft, "fp32", 24, seed=0
    )
    adalora.load_state(trained, load_file(point / "adalora.safetensors"))
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder.adapter))
    merged = AutoModelForCausalLM.from_pretrained(folder.merged)
    ids = torch.tensor([[5, 9, 7, 33]])
    with torch.no_grad():
        expected, *others = (model.eval()(input_ids=ids).logits for model in (trained, adapted, merged))
    for logits in others:
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("step", [3, 13, 19])
def test_resumes_bitwise_before_during_and_after_the_allocation(step, base, tmp_path, monkeypatch):
    resumed = (*RUN, "model.save_steps=1")
    whole = finish(small_run(tmp_path / "whole", base, *resumed))
    run = small_run(tmp_path / "stopped", base, *resumed)
    stop_at(monkeypatch, step)
    with pytest.raises(KeyboardInterrupt):
        experiment.execute(run)
    monkeypatch.undo()
    (file,) = (tmp_path / "stopped").rglob("run.json")
    folder = finish(run)
    assert folder.path == RunFolder(file.parent).path
    name = "adapter_model.safetensors"
    assert (folder.adapter / name).read_bytes() == (whole.adapter / name).read_bytes()


def test_tied_embeddings_that_train_stay_tied_and_are_merged_in_the_base_s_dtype(tokenizer, tmp_path):
    base = folder_of(random_llama(len(tokenizer), tie_word_embeddings=True), tokenizer, tmp_path / "base")
    run = small_run(tmp_path, base, *RUN, "peft.train_embeddings=true", "model.bf16=true", "model.epochs=1")
    folder = finish(run)
    merged = AutoModelForCausalLM.from_pretrained(folder.merged)
    words, output = merged.get_input_embeddings().weight, merged.get_output_embeddings().weight
    assert words is output and words.dtype == torch.bfloat16
    original = AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight
    assert not torch.equal(words, original.bfloat16())
    merge_run(folder)
    again = AutoModelForCausalLM.from_pretrained(folder.merged)
    assert all(torch.equal(*pair) for pair in zip(merged.parameters(), again.parameters(), strict=True))
