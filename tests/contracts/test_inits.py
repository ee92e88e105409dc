"""What every conf/init that initialises adapters must keep."""

import dataclasses
import json

import pytest
import torch
from peft import PeftModel

from lora_one.adaptation import layers as adapters
from lora_one.adaptation.checkpoints import load_factors, save_adapter, save_factors
from lora_one.adaptation.wrapping import wrap
from lora_one.data.encode import batches_of
from lora_one.errors import UsageError
from lora_one.initialization.methods import build_init
from lora_one.initialization.solution import Probe
from lora_one.initialization.start import attach_adapters
from lora_one.types import LayerView
from tests.helpers.examples import examples
from tests.helpers.models import quantized_llama, random_llama
from tests.helpers.runs import ADAPTER_INITS as CHOICES
from tests.helpers.runs import adaptation_for, run_config, start_of


def settings_of(choice):
    run = run_config(f"init={choice}", *(["model.quantization=nf4"] if choice == "loftq" else []))
    return dataclasses.replace(run, init=run.init.completed(lambda: 1e-3, 100))


BY_PEFT = [choice for choice in CHOICES if settings_of(choice).init.by_peft]
BY_LAYER = [choice for choice in CHOICES if choice not in BY_PEFT]
IDS = torch.arange(3, 40).reshape(1, -1)

pytestmark = pytest.mark.usefixtures("attrs_package")


@pytest.fixture
def view():
    weight = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
    return lambda: LayerView(
        "layer", (12, 8), lambda: weight, 3, 4.0, torch.Generator().manual_seed(0), lambda: weight + weight.sin()
    )


@pytest.fixture
def base_of(tmp_path):
    """The random model, quantised for the method that is about that; and its weights as they were."""

    def base(choice):
        if choice == "loftq":
            return quantized_llama(tmp_path, hidden_size=64, intermediate_size=128)
        return random_llama(), None

    return base


@pytest.fixture
def attached(base_of):
    """The base started by a choice; skips one that cannot run here."""

    def start(choice):
        run = settings_of(choice)
        try:
            method = build_init(run.init)
        except UsageError as error:
            pytest.skip(str(error))
        probe = Probe(batches_of(examples(), 5, 0), "example")
        base, originals = base_of(choice)
        return attach_adapters(base, adaptation_for(run), method, probe, seed=0, originals=originals)

    return start


@pytest.mark.parametrize("choice", BY_LAYER)
def test_every_init_keeps_the_contract(choice, view):
    init = settings_of(choice).init
    gradient = torch.randn(12, 8, generator=torch.Generator().manual_seed(2))
    factors, again = start_of(init, view(), gradient), start_of(init, view(), gradient)
    assert factors.B.shape == (12, 3) and factors.A.shape == (3, 8)
    assert factors.B.dtype == factors.A.dtype == torch.float32
    assert torch.isfinite(factors.B @ factors.A).all()
    assert torch.equal(factors.B, again.B) and torch.equal(factors.A, again.A), "same generator, same factors"


@pytest.mark.parametrize("choice", BY_PEFT)
def test_every_init_of_peft_keeps_the_contract(choice, attached):
    """Also: the function starts unchanged."""
    model, start = attached(choice)
    again, _ = attached(choice)
    for (name, layer), other in zip(
        adapters.lora_layers(model).items(), adapters.lora_layers(again).values(), strict=True
    ):
        (m, n), r = layer.get_base_layer().weight.shape, 8
        for part, shape in (("lora_B", (m, r)), ("lora_A", (r, n))):
            factor = getattr(layer, part)["default"].weight
            assert factor.shape == shape and factor.dtype == torch.float32, (name, part)
            assert torch.isfinite(factor).all() and torch.equal(factor, getattr(other, part)["default"].weight)
        assert layer.lora_A["default"].weight.any()
        assert start.relative_shift[name] >= 0
    pretrained, started = random_llama()(IDS).logits, model.eval()(IDS).logits
    assert (started - pretrained).abs().max() <= 1e-4 * pretrained.abs().max()


@pytest.mark.parametrize("choice", [choice for choice in BY_LAYER if settings_of(choice).init.shifts_base])
@torch.no_grad()
def test_every_init_that_changes_the_base_keeps_the_function(choice, attached):
    model, start = attached(choice)
    pretrained, started = random_llama()(IDS).logits, model.eval()(IDS).logits
    assert (started - pretrained).abs().max() <= 1e-4 * pretrained.abs().max()
    assert len(start.initial_factors) == 14 and all(shift > 0 for shift in start.relative_shift.values())


@pytest.mark.parametrize("choice", CHOICES)
@torch.no_grad()
def test_plain_peft_loads_what_was_trained(choice, tmp_path, attached, base_of):
    """After the factors have moved, as in training, and on the original base."""
    model, start = attached(choice)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter += torch.randn(parameter.shape, generator=generator) * 0.05
    save_adapter(model, tmp_path / "adapter", start.initial_factors)
    trained = model.eval()(IDS).logits
    loaded = PeftModel.from_pretrained(base_of(choice)[0], str(tmp_path / "adapter")).eval()(IDS).logits
    converted = start.initial_factors or settings_of(choice).peft.lora_xs
    bound = 1e-4 if converted else 0.0
    assert (loaded - trained).abs().max() <= bound * trained.abs().max()
    assert (base_of(choice)[0](IDS).logits - trained).abs().max() > 1e-2 * trained.abs().max()
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["init_lora_weights"] is True and config["r"] == (16 if start.initial_factors else 8)
    assert not (config["eva_config"] or config["corda_config"] or config["lora_ga_config"])
    assert bool(config["rank_pattern"]) == settings_of(choice).init.sets_ranks


@pytest.mark.parametrize("choice", CHOICES)
def test_resumed_run_has_the_same_base(choice, tmp_path, attached, base_of):
    """Bit for bit, from what is on disk, without initialising again."""
    model, start = attached(choice)
    save_factors(start.initial_factors, tmp_path / "kept.safetensors")
    run = settings_of(choice)
    ranks = start.solution.ranks if run.init.sets_ranks else None
    resumed = wrap(base_of(choice)[0], run.peft, run.init.dtype, ranks)
    adapters.shift_base(resumed, load_factors(tmp_path / "kept.safetensors"))
    for (name, one), two in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert one.shape == two.shape and ("lora_" in name or torch.equal(one, two)), name


def test_lora_starts_at_the_pretrained_function(view):
    """A uniform in +-1/sqrt(n) (Kaiming with a = sqrt 5), B zero."""
    factors = build_init(run_config("init=default").init).factors(view(), None)
    assert not factors.B.any()
    assert factors.A.abs().max() <= 8**-0.5 and factors.A.std() == pytest.approx((1 / 3 / 8) ** 0.5, rel=0.3)


def test_gaussian_has_its_standard_deviation():
    method = build_init(run_config("init=gaussian", "init.lora_A_std=0.5").init)
    wide = LayerView("layer", (12, 4000), lambda: None, 3, 4.0, torch.Generator().manual_seed(0))
    factors = method.factors(wide, None)
    assert factors.A.std() == pytest.approx(0.5, rel=0.03) and not factors.B.any()
