"""Which layers are adapted, and that the factors get where they belong."""

import pytest
import torch
from peft import PeftModel

from lora_one.adaptation import layers as adapters
from lora_one.adaptation.checkpoints import save_adapter
from lora_one.adaptation.merging import merge_adapter
from lora_one.errors import RunError, UsageError
from tests.helpers.examples import autograd_gradients, examples
from tests.helpers.models import random_deepseek, random_llama, random_reader_of_images
from tests.helpers.runs import attach, run_config


def test_all_means_every_linear_layer_but_the_head():
    layers = adapters.target_layers(random_llama(), run_config().peft)
    names = {name.rpartition(".")[2] for name in layers}
    assert len(layers) == 14
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_list_means_names_with_that_ending():
    layers = adapters.target_layers(random_llama(), run_config("peft=qv").peft)
    assert {name.rpartition(".")[2] for name in layers} == {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"}
    one = adapters.target_layers(random_llama(), run_config("peft.lora_target_modules=[layers.1.mlp.up_proj]").peft)
    assert list(one) == ["model.layers.1.mlp.up_proj"]
    with pytest.raises(UsageError, match=r"q_prj matches no linear layer.*did you mean q_proj\?"):
        adapters.target_layers(random_llama(), run_config("peft.lora_target_modules=[q_prj]").peft)


def test_peft_adapts_exactly_those_layers():
    """Also where one name ending is adapted in one place and not in another."""
    run = run_config("init=default", "peft.lora_target_modules=[layers.1.mlp.up_proj,q_proj]")
    model, _ = attach(random_llama(), run)
    assert set(adapters.lora_layers(model)) == set(adapters.target_layers(random_llama(), run.peft))


def test_layers_that_process_images_are_not_adapted():
    run = run_config("peft.lora_r=2", "init=lora")
    layers = adapters.target_layers(random_reader_of_images(), run.peft)
    assert len(layers) == 14 and all(name.startswith("model.language_model.layers.") for name in layers)
    model, _ = attach(random_reader_of_images(), run)
    assert set(adapters.lora_layers(model)) == set(layers)
    with pytest.raises(UsageError, match=r"fc1 matches no linear layer.*valid: down_proj"):
        adapters.target_layers(random_reader_of_images(), run_config("peft.lora_target_modules=[fc1]").peft)


def test_layers_that_peft_takes_for_experts_are_left_out_and_named(tmp_path):
    """Their adapter would be written, but nobody could load it: PEFT would adapt the fused experts instead."""
    run = run_config("peft.lora_r=2", "init=lora")
    parts = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    expected = {f"model.layers.{block}.self_attn.{part}" for block in (0, 1) for part in parts}
    assert set(adapters.target_layers(random_deepseek(), run.peft)) == expected
    words = r"2 tensors of fused experts .* and 6 linear layers that PEFT takes for experts .*\(.*mlp\.gate_proj\)"
    with pytest.warns(UserWarning, match=words):
        model, _ = attach(random_deepseek(), run)
    assert set(adapters.lora_layers(model)) == expected
    ids = torch.arange(3, 40).reshape(1, -1)
    with torch.no_grad():
        for layer in adapters.lora_layers(model).values():
            layer.lora_B["default"].weight.normal_(std=0.1)
        trained = model(ids).logits
        save_adapter(model, tmp_path)
        torch.testing.assert_close(PeftModel.from_pretrained(random_deepseek(), tmp_path)(ids).logits, trained)
        torch.testing.assert_close(merge_adapter(model)(ids).logits, trained, rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match=r"PEFT reads up_proj as the name of experts, .*valid: kv_a_proj_with_mqa"):
        adapters.target_layers(random_deepseek(), run_config("peft.lora_target_modules=[q_a_proj,up_proj]").peft)


def test_all_leaves_out_a_gate_of_one_output():
    model = random_llama()
    model.model.layers[0].gate = torch.nn.Linear(32, 1)
    assert len(adapters.target_layers(model, run_config().peft)) == 14
    named = run_config("peft.lora_target_modules=[gate]", "peft.lora_r=1").peft
    assert list(adapters.target_layers(model, named)) == ["model.layers.0.gate"]


def test_every_layer_starts_at_its_own_gradient():
    """Through the whole chain: gradient, method, PEFT; W itself is unchanged."""
    run = run_config("init.stable_gamma=128")
    data = examples()
    gradients = autograd_gradients(random_llama(), data, "example")
    base = random_llama()
    weights = {name: layer.weight.clone() for name, layer in adapters.target_layers(base, run.peft).items()}
    model, start = attach(base, run, data)
    scaling = 16 / 8**0.5
    for name, layer in adapters.lora_layers(model).items():
        U, S, Vh = torch.linalg.svd(-gradients[name], full_matrices=False)
        expected = U[:, :8] * S[:8] @ Vh[:8] / (128 * S[0])
        B, A = layer.lora_B["default"].weight, layer.lora_A["default"].weight
        torch.testing.assert_close(B @ A, expected, rtol=1e-3, atol=1e-6, msg=name)
        assert layer.scaling["default"] == scaling
        assert torch.equal(layer.get_base_layer().weight, weights[name])
        shift = scaling * (B @ A).detach().norm() / weights[name].norm()
        assert start.relative_shift[name] == pytest.approx(shift.item(), rel=1e-4)


@pytest.mark.parametrize(("init", "shift"), [("lora", 0.0), ("pissa", 0.0), ("random_ab", 1.0)])
def test_a_layer_of_zeros_can_be_adapted(init, shift):
    base = random_llama()
    base.get_submodule("model.layers.0.self_attn.o_proj").weight.data.zero_()
    _, start = attach(base, run_config(f"init={init}"))
    assert start.relative_shift["model.layers.0.self_attn.o_proj"] == shift


def test_without_rslora_the_scaling_is_alpha_over_r():
    run = run_config("peft.use_rslora=false", "peft.lora_alpha=24")
    model, _ = attach(random_llama(), run)
    assert {layer.scaling["default"] for layer in adapters.lora_layers(model).values()} == {3.0}
    assert adapters.scaling_of(run.peft) == 3.0


def test_only_the_factors_train():
    model, _ = attach(random_llama(), run_config())
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 28 and all(".lora_A." in name or ".lora_B." in name for name in trainable)


def test_the_start_does_not_depend_on_what_was_drawn_before():
    torch.manual_seed(1)
    one, _ = attach(random_llama(), run_config("init=default"))
    torch.manual_seed(2)
    torch.randn(100)
    two, _ = attach(random_llama(), run_config("init=default"))
    for (name, first), (_, second) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        assert torch.equal(first, second), name


def test_layer_with_a_zero_gradient_is_named():
    model = random_llama()
    model.model.layers[1].mlp.down_proj.weight.zero_()  # so nothing reaches gate and up
    with pytest.raises(RunError, match=r"init: .*layers\.1\.mlp\.(gate|up)_proj.* is zero"):
        attach(model, run_config())


def test_weights_that_are_not_finite_are_an_error():
    model = random_llama()
    model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(RunError, match="init: the loss on the initialisation examples is nan"):
        attach(model, run_config())
