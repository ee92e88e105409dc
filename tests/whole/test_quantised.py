"""Bases quantised by bitsandbytes: the gradient, the start and a step of training, with the weights as they are."""

import json
import shutil

import pytest
import torch

from lora_one.adaptation import layers as adapters
from lora_one.adaptation.checkpoints import load_adapter
from lora_one.adaptation.merging import save_merged
from lora_one.adaptation.wrapping import wrap
from lora_one.data.encode import batches_of
from lora_one.errors import UsageError
from lora_one.evaluation.command import main as evaluate
from lora_one.initialization.low_rank_step import StepSettings, low_rank_steps
from lora_one.initialization.methods import build_init
from lora_one.initialization.solution import Probe
from lora_one.initialization.start import attach_adapters
from lora_one.losses import loss_sum, model_logits, targets
from lora_one.models import load_model, load_tokenizer
from lora_one.records.folder import base_of
from lora_one.runs import saving
from tests.helpers.examples import assert_same, autograd, examples, gradients, linear_layers
from tests.helpers.models import quantized, quantized_llama, random_gpt2, random_llama
from tests.helpers.runs import adaptation_for, finish, run_config, small_run

SIZES = {"hidden_size": 64, "intermediate_size": 128}
# int8 rounds activations too, to one part in 127 of each row's largest and through fp16; nf4 computes in fp32
BOUNDS = {"nf4": 1e-5, "int8": 0.05}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(params=["int8", "nf4"])
def kind(request):
    return request.param


@pytest.fixture
def quantised(folder, kind):
    model, _ = quantized_llama(folder, kind, **SIZES)
    return model


def dequantised(model):
    """The same function in fp32."""
    plain = random_llama(**SIZES)
    for name, layer in linear_layers(plain).items():
        layer.weight.copy_(adapters.wide_weight(model.get_submodule(name)))
    return plain


@pytest.mark.parametrize(("hold", "checkpointing"), [("device", False), ("cpu", True), ("layer", False)])
def test_gradient_is_that_of_the_dequantised_model(quantised, kind, hold, checkpointing):
    layers = adapters.target_layers(quantised, run_config().peft)
    assert len(layers) == 14 and not any(layer.weight.is_floating_point() for layer in layers.values())
    plain, batches = dequantised(quantised), batches_of(examples(), 5, 0)
    expected = autograd(plain, linear_layers(plain), batches)
    assert_same(gradients(quantised, layers, batches, hold, checkpointing), expected, BOUNDS[kind])


def test_sketched_steps_too(quantised, kind):
    plain, batches = dequantised(quantised), batches_of(examples(), 2, 0)
    expected = autograd(plain, linear_layers(plain), batches)
    found = {}
    settings = StepSettings(singular=4, memory="low")
    low_rank_steps(quantised, linear_layers(quantised), batches, "example", settings, found.__setitem__)
    for name, G in expected.items():
        S = torch.linalg.svdvals(G)[:4]
        assert (found[name].S - S).norm() <= (BOUNDS[kind] + 2e-3) * S.norm(), name


def test_layer_view_dequantises(quantised, kind):
    original = random_llama(**SIZES)
    model = wrap(quantised, run_config().peft, "fp32")
    for name, layer in adapters.lora_layers(model).items():
        view = adapters.layer_view(name, layer, 0)
        W = original.get_submodule(name).weight
        assert view.shape == tuple(W.shape) and view.weight().dtype == torch.float32
        assert (view.weight() - W).norm() <= {"nf4": 0.2, "int8": 0.01}[kind] * W.norm(), name
        ids = torch.eye(W.shape[1])
        assert (layer.get_base_layer()(ids).T - view.weight()).norm() <= 1e-3 * W.norm(), (
            name
        )  # what the layer itself multiplies by


def attach(model, *overrides):
    run = run_config(*overrides)
    probe = Probe(batches_of(examples(), 2, 0), "example")
    return attach_adapters(model, adaptation_for(run), build_init(run.init), probe, seed=0)


def test_lora_one_starts_and_trains(quantised, kind):
    expected, _ = attach(dequantised(quantised))
    weights = {name: adapters.wide_weight(layer) for name, layer in linear_layers(quantised).items()}
    model, start = attach(quantised)
    scaling = 16 / 8**0.5
    for name, layer in adapters.lora_layers(model).items():
        B, A = layer.lora_B["default"].weight.detach(), layer.lora_A["default"].weight.detach()
        if kind == "nf4":
            other = adapters.lora_layers(expected)[name]
            moved = other.lora_B["default"].weight @ other.lora_A["default"].weight
            torch.testing.assert_close(B @ A, moved, rtol=1e-2, atol=1e-5, msg=name)
        shift = float(scaling * (B @ A).norm() / weights[name].norm())
        assert start.relative_shift[name] == pytest.approx(shift, rel=1e-4)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    (batch,) = batches_of(examples(), 5, 0)
    losses = []
    for _ in range(3):
        loss = loss_sum(model_logits(model, batch), targets(batch), "example") / 5
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[1] < losses[0]
    for name, layer in adapters.lora_layers(model).items():
        assert torch.equal(adapters.wide_weight(layer.get_base_layer()), weights[name]), name


@pytest.mark.parametrize(
    "overrides", [("init.direction=LoRA-GA",), ("init=svd",), ("init=default", "init.lora_B=unit")]
)
def test_methods_that_change_the_base_are_refused(quantised, overrides):
    before = {name: layer.weight.clone() for name, layer in linear_layers(quantised).items()}
    with pytest.raises(UsageError, match=r"is quantised \(Linear.*bit.*W - s B A.*set init=lora, lora_one") as error:
        attach(quantised, *overrides)
    assert "\n" not in str(error.value)
    assert all(torch.equal(layer.weight, before[name]) for name, layer in linear_layers(quantised).items())


def test_a_resumed_run_does_not_change_a_quantised_base_either(quantised):
    model = wrap(quantised, run_config().peft, "fp32")
    name = next(iter(adapters.lora_layers(model)))
    with pytest.raises(UsageError, match="is quantised"):
        adapters.shift_base(model, {name: (torch.ones(64, 2), torch.ones(2, 64))})


def test_loftq_compensates_the_quantisation_error(folder):
    """s B A = [W - Q]_r, by the exact SVD; Q stays, and Q + s B A is nearer to W in every layer."""
    base, originals = quantized_llama(folder, **SIZES)
    run = run_config("init=loftq", "model.quantization=nf4")
    model, _ = attach_adapters(base, adaptation_for(run), build_init(run.init), None, seed=0, originals=originals)
    plain = random_llama(**SIZES)
    for name, layer in adapters.lora_layers(model).items():
        W, Q = plain.get_submodule(name).weight, adapters.wide_weight(layer.get_base_layer())
        U, S, Vh = torch.linalg.svd(W - Q, full_matrices=False)
        B, A = layer.lora_B["default"].weight.detach(), layer.lora_A["default"].weight.detach()
        moved = layer.scaling["default"] * B @ A
        torch.testing.assert_close(moved, U[:, :8] * S[:8] @ Vh[:8], rtol=1e-3, atol=1e-6, msg=name)
        torch.testing.assert_close(B.T @ B, A @ A.T, rtol=1e-3, atol=1e-6)
        assert (W - Q - moved).norm() < 0.95 * (W - Q).norm(), name


def test_loftq_on_conv1d_compensates_the_error_of_the_transposed_weight(tmp_path):
    """GPT-2's files hold W^T; bitsandbytes quantises W, and c_proj is square, so that its shape does not tell."""
    base, originals = quantized(lambda: random_gpt2(n_embd=64), tmp_path)
    run = run_config("init=loftq", "model.quantization=nf4")
    model, _ = attach_adapters(base, adaptation_for(run), build_init(run.init), None, seed=0, originals=originals)
    plain = random_gpt2(n_embd=64)
    for name, layer in adapters.lora_layers(model).items():
        W, Q = plain.get_submodule(name).weight.T, adapters.wide_weight(layer.get_base_layer())
        moved = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        assert (W - Q - moved).norm() < 0.95 * (W - Q).norm() < 0.2 * W.norm(), name


@pytest.mark.parametrize("init", ["gradient", "loftq"])
def test_a_whole_run_on_a_quantised_base(tmp_path, llama_folder, init, capsys):
    """Trained, saved, merged and evaluated: always Q + s B A, never W + s B A."""
    pytest.importorskip("bitsandbytes", reason="quantised bases need bitsandbytes: pip install -e .[quant]")
    options = (f"init={init}", "model.quantization=nf4", "model.saving=true", "model.keep_epochs=true")
    folder = finish(small_run(tmp_path, llama_folder, *options))
    assert "adapter/ is for the base quantised to nf4" in capsys.readouterr().out
    record = folder.read()
    assert record["status"] == "finished" and record["train"]["steps"] == 6
    ids = torch.arange(3, 40)[None]
    base, _ = quantized_llama(llama_folder)
    trained = load_adapter(base, folder.adapter).eval()(ids).logits.detach()
    merged = load_model(str(folder.merged), dtype="fp32")
    assert not getattr(merged, "is_quantized", False) and "quantization_config" not in merged.config.to_dict()
    assert (merged(ids).logits - trained).abs().max() <= 1e-4 * trained.abs().max()
    plain = load_adapter(load_model(str(llama_folder), dtype="fp32"), folder.adapter).eval()(ids).logits
    assert (plain - trained).abs().max() > 1e-2 * trained.abs().max()
    again = tmp_path / "again"
    save_merged(merged, load_tokenizer(str(llama_folder)), again)
    folder.update(artifacts={"adapter": "adapter"})
    shutil.rmtree(folder.merged)
    saving.merge_run(folder)
    assert (folder.merged / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    data = tmp_path / "test.jsonl"
    data.write_text(json.dumps({"question": "What is 1 + 1?", "answer": "#### 2"}) + "\n")
    assert base_of(folder.adapter) == {"dtype": "fp32", "quantization": "nf4"}
    folder.update(config=record["config"] | {"model": record["config"]["model"] | {"bf16": True}})
    assert base_of(folder.adapter) == {"dtype": "bf16", "quantization": "nf4"}, "quantised after rounding to bf16"
    assert base_of(folder.path.parent) == {}
    assert base_of(folder.epochs / "1") == base_of(folder.adapter), "the adapters of the epochs are on the same base"
    folder.update(config=record["config"])
    completions = []
    sources = {f"--adapter={folder.adapter}": "eval", f"--adapter={folder.epochs / '1'}": "eval/epochs/1"}
    for source, place in (sources | {f"--model_name={folder.merged}": "eval"}).items():
        evaluate("gsm8k", [source, f"--data_path={data}", "--max_new_tokens=8", "--overwrite"])
        written = (folder.path / place / "gsm8k/predictions.jsonl").read_text()
        completions.append(json.loads(written)["completion"])
    assert completions[0] == completions[1] == completions[2]
