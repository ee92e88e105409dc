"""Bases quantised by bitsandbytes: the gradient, the start and a step of training, with the weights as they are."""

import logging
import warnings

import pytest
import torch
from conftest import random_llama, run_config
from test_gradients import examples, linear_layers
from test_steps import assert_same, autograd, gradients
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from lora_one import adapters
from lora_one.data.encode import batches_of
from lora_one.errors import UsageError
from lora_one.inits import build_init
from lora_one.losses import loss_sum, model_logits
from lora_one.start import Probe, attach_adapters
from lora_one.steps import StepSettings, low_rank_steps

with warnings.catch_warnings():  # torch's own, of a dependency that bitsandbytes imports
    warnings.filterwarnings("ignore", message=".*torch.jit.script", category=DeprecationWarning)
    pytest.importorskip("bitsandbytes", reason="quantised bases need bitsandbytes: pip install -e .[quant]")

SIZES = {"hidden_size": 64, "intermediate_size": 128}
KINDS = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}
# int8 rounds activations too, to one part in 127 of each row's largest and through fp16; nf4 computes in fp32
BOUNDS = {"nf4": 1e-5, "int8": 0.05}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "random-llama"
    random_llama(**SIZES).save_pretrained(path)
    return path


@pytest.fixture(params=sorted(KINDS))
def kind(request):
    return request.param


@pytest.fixture
def quantised(folder, kind):
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    model = LlamaForCausalLM.from_pretrained(folder, quantization_config=KINDS[kind], dtype=torch.float32)
    return model.requires_grad_(False).eval()


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
    settings = StepSettings(4, memory="low")
    low_rank_steps(quantised, linear_layers(quantised), batches, "example", settings, found.__setitem__)
    for name, G in expected.items():
        S = torch.linalg.svdvals(G)[:4]
        assert (found[name].S - S).norm() <= (BOUNDS[kind] + 2e-3) * S.norm(), name


def test_layer_view_dequantises(quantised, kind):
    original = random_llama(**SIZES)
    model = adapters.wrap(quantised, run_config().peft, "fp32")
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
    return attach_adapters(model, run.peft, build_init(run.init), probe, seed=0, dtype="fp32")


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
        loss = loss_sum(model_logits(model, batch), batch["labels"], "example") / 5
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
    with pytest.raises(UsageError, match=r"is quantised \(Linear.*bit.*W - s B A.*take init=gradient") as error:
        attach(quantised, *overrides)
    assert "\n" not in str(error.value)
    assert all(torch.equal(layer.weight, before[name]) for name, layer in linear_layers(quantised).items())


def test_a_resumed_run_does_not_change_a_quantised_base_either(quantised):
    model = adapters.wrap(quantised, run_config().peft, "fp32")
    name = next(iter(adapters.lora_layers(model)))
    with pytest.raises(UsageError, match="is quantised"):
        adapters.shift_base(model, {name: (torch.ones(64, 2), torch.ones(2, 64))})
