"""The start as a whole: its figures, the search for gamma, the cache, and DoRA-One."""

import json

import pytest
import torch
from peft import PeftModel

from lora_one.adaptation import layers as adapters
from lora_one.adaptation.checkpoints import save_adapter
from lora_one.adaptation.merging import merge_adapter
from lora_one.data.encode import batches_of
from lora_one.losses import mean_loss
from tests.helpers.examples import autograd_gradients, examples
from tests.helpers.models import random_llama
from tests.helpers.runs import attach_llama, finish, run_config, small_run

IDS = torch.arange(3, 40).reshape(1, -1)


# figures
@torch.no_grad()
@pytest.mark.parametrize(
    "overrides", [("init.stable_gamma=1e4",), ("init.direction=LoRA-SB",), ("init.direction=LoRA-GA",)]
)
def test_predicted_decrease_is_the_first_order(overrides):
    """- sum over layers <G, W_eff - W>, of autograd's G; and what the loss really falls by where the step is small."""
    data, base = examples(), random_llama().double()
    weights = {name: layer.weight.clone() for name, layer in adapters.target_layers(base, run_config().peft).items()}
    with torch.enable_grad():
        gradients = autograd_gradients(random_llama().double(), data, "example")
    model, start = attach_llama(*overrides, base=base, data=data)
    expected = 0.0
    for name, layer in adapters.lora_layers(model).items():
        moved = layer.get_base_layer().weight - weights[name]
        moved = moved + layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        expected -= float((gradients[name] * moved).sum())
    predicted, before = start.solution.predicted_decrease, start.solution.examples.loss
    # LoRA-GA's step at the start is nothing but rounding
    assert predicted == pytest.approx(expected, rel=1e-3, abs=1e-6)
    real = before - mean_loss(model, batches_of(data, 2, 0), "example")
    if "LoRA-GA" not in overrides[0]:
        assert real > 0 and predicted == pytest.approx(real, rel=0.02)


def test_run_reports_the_effect_of_its_start(tmp_path, llama_folder, capsys):
    own = ("init.scale=search", "init.search_examples=0")
    run = small_run(tmp_path, llama_folder, "model.epochs=0", *own)
    record = finish(run).read()["init"]
    energies = record["captured_energy"]["layers"]
    assert len(energies) == 14 and min(energies.values()) == record["captured_energy"]["min"]
    assert record["cached"] is False
    shown = capsys.readouterr().out
    assert f"{record['loss_before']:.4f} -> {record['loss_after']:.4f} (lower by" in shown
    assert f"first-order prediction: lower by {record['predicted_decrease']:.4f})" in shown
    found = record["searched"]
    assert f"gamma = {found['gamma']:.4g} has the lowest loss on " in shown
    assert record["loss_after"] == pytest.approx(min(found["losses"].values()), rel=1e-5)
    assert record["loss_after"] == pytest.approx(found["losses"][str(found["gamma"])], rel=1e-5)


# DoRA
@torch.no_grad()
def test_dora_one_starts_where_lora_one_does():
    """m = ||W + s B A|| by row, so m (W + s B A) / ||W + s B A|| = W + s B A; B and A as without DoRA."""
    plain, _ = attach_llama("init.stable_gamma=128")
    dora, _ = attach_llama("peft=dora", "init.stable_gamma=128")
    for (name, layer), other in zip(
        adapters.lora_layers(dora).items(), adapters.lora_layers(plain).values(), strict=True
    ):
        B, A = layer.lora_B["default"].weight, layer.lora_A["default"].weight
        assert torch.equal(B, other.lora_B["default"].weight) and torch.equal(A, other.lora_A["default"].weight), name
        magnitude = layer.lora_magnitude_vector["default"].weight
        moved = layer.get_base_layer().weight + 16 / 8**0.5 * B @ A
        torch.testing.assert_close(magnitude, moved.square().sum(dim=1).sqrt(), rtol=1e-6, atol=0)
    torch.testing.assert_close(dora(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-5)
    trained = [name for name, value in dora.named_parameters() if value.requires_grad]
    assert sum("lora_magnitude_vector" in name for name in trained) == 14 and len(trained) == 3 * 14


@torch.no_grad()
@pytest.mark.parametrize("init", ["gradient", "default", "svd", "lora_ga_peft"])
def test_dora_is_saved_and_merged_as_it_was_trained(init, tmp_path):
    """Also where the base was shifted, and against m (W + s B A) / ||W + s B A|| written out."""
    model, start = attach_llama(f"init={init}", "peft=dora")
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter += torch.randn(parameter.shape, generator=generator) * 0.05
    model.eval()
    trained = model(IDS).logits
    save_adapter(model, tmp_path / "adapter", start.initial_factors)
    loaded = PeftModel.from_pretrained(random_llama(), str(tmp_path / "adapter")).eval()(IDS).logits
    bound = 1e-4 if start.initial_factors else 0.0
    assert (loaded - trained).abs().max() <= bound * trained.abs().max()
    expected = {}
    for name, layer in adapters.lora_layers(model).items():
        V = layer.get_base_layer().weight + layer.scaling["default"] * (
            layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        )
        expected[name] = layer.lora_magnitude_vector["default"].weight[:, None] * V / V.norm(dim=1, keepdim=True)
    merged = merge_adapter(model)
    assert (merged(IDS).logits - trained).abs().max() <= 1e-4 * trained.abs().max()
    for name, weight in expected.items():
        torch.testing.assert_close(merged.get_submodule(name).weight, weight, rtol=1e-5, atol=1e-6, msg=name)


def test_dora_run_names_itself(tmp_path, llama_folder):
    run = small_run(tmp_path, llama_folder, "peft=dora", "model.epochs=0")
    folder = finish(run)
    assert folder.path.parent.name.startswith("DoRA-One-r8")
    config = json.loads((folder.adapter / "adapter_config.json").read_text())
    assert config["use_dora"] is True
