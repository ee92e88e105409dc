"""The start as a whole: its figures, the search for gamma, the cache, and DoRA-One."""

import dataclasses
import json
import math

import pytest
import torch
from conftest import finish, random_llama, run_config, small_run
from peft import PeftModel
from test_gradients import autograd_gradients, examples

from lora_one import adapters, stages
from lora_one import start as start_room
from lora_one.checkpoints import merge_adapter, save_adapter
from lora_one.data.encode import batches_of
from lora_one.errors import RunError
from lora_one.inits import build_init
from lora_one.losses import mean_loss
from lora_one.start import Probe, attach_adapters
from lora_one.start.cache import Cache, content_of
from lora_one.start.search import search_multiple

IDS = torch.arange(3, 40).reshape(1, -1)


def attach(*overrides, base=None, cached=None, data=None):
    run = run_config(*overrides)
    init = dataclasses.replace(run.init, eta=1e-6) if getattr(run.init, "direction", "") == "LoRA-SB" else run.init
    probe = Probe(batches_of(data or examples(), 2, 0), "example")
    base = random_llama() if base is None else base
    return attach_adapters(base, run.peft, build_init(init), probe, seed=0, dtype="fp32", cached=cached)


def factors_of(model):
    return {name: value.detach().clone() for name, value in model.named_parameters() if "lora_" in name}


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
    model, start = attach(*overrides, base=base, data=data)
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


def test_a_run_tells_what_its_start_did(tmp_path, llama_folder, capsys):
    run = small_run(tmp_path, llama_folder, "model.epochs=0", "init.scale=search", "dataset.accuracy_examples=0")
    record = finish(run).read()["init"]
    energies = record["captured_energy"]["layers"]
    assert len(energies) == 14 and min(energies.values()) == record["captured_energy"]["min"]
    assert record["cached"] is False
    shown = capsys.readouterr().out
    assert f"{record['loss_before']:.4f} -> {record['loss_after']:.4f}, down" in shown
    assert f"the first order predicts {record['predicted_decrease']:.4f}" in shown
    found = record["searched"]
    assert f"gamma {found['gamma']:g} has the least loss" in shown
    assert record["loss_after"] == pytest.approx(min(found["losses"].values()), rel=1e-5)
    assert record["loss_after"] == pytest.approx(found["losses"][str(found["gamma"])], rel=1e-5)


# the search


@pytest.mark.parametrize("best", [2.0**k for k in range(-12, 13)])
def test_search_finds_the_least_of_a_unimodal_loss(best):
    """Quadratic in log2, so the least among powers of two is at ``best``."""
    asked = []

    def loss(multiple):
        asked.append(multiple)
        return (math.log2(multiple) - math.log2(best)) ** 2

    found, losses = search_multiple(loss)
    assert found == best and losses[best] == 0.0
    assert len(asked) == len(set(asked)) == len(losses) <= 6 + abs(math.log2(best)) / 2, "no loss is asked for twice"


def test_search_backs_out_of_losses_that_are_no_numbers():
    found, losses = search_multiple(lambda multiple: math.nan if multiple > 0.1 else (multiple - 2**-4) ** 2)
    assert found == 2**-4 and math.isnan(losses[1.0])


def test_search_ends_where_every_way_is_down():
    for sign in (1, -1):
        found, losses = search_multiple(lambda multiple, sign=sign: sign * multiple)
        assert math.log2(found) == -sign * 13 and len(losses) < 15


@pytest.mark.parametrize("peft", ["all", "dora"])
def test_searched_gamma_is_as_if_it_had_been_given(peft):
    model, start = attach(f"peft={peft}", "init.scale=search")
    losses = start.solution.searched
    gamma = min(losses, key=losses.get)
    given, plain = attach(f"peft={peft}", f"init.stable_gamma={gamma}")
    for name, value in factors_of(given).items():
        torch.testing.assert_close(factors_of(model)[name], value, rtol=1e-5, atol=1e-7, msg=name)
    assert start.solution.predicted_decrease == pytest.approx(plain.solution.predicted_decrease, rel=1e-5)
    batches = batches_of(examples(), 2, 0)
    for other, loss in losses.items():
        model, _ = attach(f"peft={peft}", f"init.stable_gamma={other}")
        assert mean_loss(model, batches, "example") == pytest.approx(loss, rel=1e-5), other
    assert losses[gamma] < start.solution.examples.loss


@pytest.mark.parametrize("fatal", [False, True])
def test_search_past_losses_that_are_no_numbers_in_a_run(tmp_path, llama_folder, monkeypatch, fatal):
    """They are null in run.json; where none is a number, the run says so."""
    real = start_room.probe_loss

    def loss(model, probe):
        largest = max(float(value.detach().abs().max()) for name, value in model.named_parameters() if "lora_A" in name)
        return math.nan if fatal or largest > 0.12 else real(model, probe)

    monkeypatch.setattr(start_room, "probe_loss", loss)
    run = small_run(tmp_path, llama_folder, "model.epochs=0", "init.scale=search", "dataset.accuracy_examples=0")
    if fatal:
        with pytest.raises(RunError, match="the loss is not finite at any of the 10 scales"):
            finish(run)
        return
    found = finish(run).read()["init"]["searched"]
    assert None in found["losses"].values() and found["losses"][str(found["gamma"])] is not None
    finite = [value for value in found["losses"].values() if value is not None]
    assert found["losses"][str(found["gamma"])] == min(finite)


# the cache


def never():
    raise AssertionError("it was in the cache")


@pytest.mark.parametrize(
    "overrides",
    [
        ("init.direction=LoRA-One",),
        ("init.scale=search",),
        ("init.direction=LoRA-GA",),
        ("init.direction=LoRA-SB",),
        ("init=pissa",),
    ],
)
def test_cached_start_is_the_one_found_before(tmp_path, monkeypatch, overrides):
    """Bit for bit, adapters and base; nothing is computed the second time."""
    said = []
    cache = Cache(tmp_path, {"method": overrides[0]}, said.append)
    model, start = attach(*overrides, cached=cache)
    monkeypatch.setattr(start_room, "solve", lambda *_: never())
    monkeypatch.setattr(start_room, "solve_by_peft", lambda *_: never())
    again, known = attach(*overrides, cached=cache)
    for (name, one), two in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    for name in ("energies", "examples", "predicted_decrease", "searched"):
        assert getattr(known.solution, name) == getattr(start.solution, name), name
    assert known.relative_shift == pytest.approx(start.relative_shift) and known.kept.keys() == start.kept.keys()
    assert said == [f"init.cache: computed anew, {tmp_path} holds no start yet", f"init.cache: from {cache.file}"]


def test_changed_key_is_computed_anew_and_says_why(tmp_path):
    said = []
    one = {"init.seed": 1, "init.gamma": 64.0, "model.name": "a"}
    attach(cached=Cache(tmp_path, one, said.append))
    attach(cached=Cache(tmp_path, one | {"init.seed": 2, "model.name": "b", "init.gamma": 3}, said.append))
    attach(cached=Cache(tmp_path, one | {"init.seed": 2}, said.append))
    assert said[2] == f"init.cache: computed anew, of those in {tmp_path} the nearest has another init.seed (1, here 2)"
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_half_an_entry_is_none(tmp_path, suffix):
    said = []
    cache = Cache(tmp_path, {"seed": 1}, said.append)
    model, _ = attach(cached=cache)
    cache.file.with_suffix(suffix).write_bytes(cache.file.with_suffix(suffix).read_bytes()[:40])
    again, _ = attach(cached=cache)
    assert said[1].startswith("init.cache: computed anew")
    attach(cached=cache)
    assert said[2].startswith("init.cache: from")
    assert all(torch.equal(value, factors_of(again)[name]) for name, value in factors_of(model).items())


def test_two_jobs_may_find_one_start(tmp_path):
    """The second one is done and writes while the first is still at it."""
    said, key = [], {"seed": 1}
    inner = Cache(tmp_path, key, said.append)

    def solve_slowly():
        attach(cached=inner)
        return inner.read()

    model, _ = attach(cached=lambda solve: Cache(tmp_path, key, said.append)(solve_slowly))
    again, start = attach(cached=inner)
    assert [text.split(",")[0] for text in said[:2]] == ["init.cache: computed anew"] * 2
    assert start.solution.cached and sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]
    assert all(torch.equal(value, factors_of(again)[name]) for name, value in factors_of(model).items())


def test_cache_that_cannot_be_written_is_one_message(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"init\.cache=.*file cannot be written .*give another folder"):
        Cache(tmp_path / "file", {}, lambda text: None)(never)  # before the work, not after it


def test_key_knows_what_the_factors_depend_on(tmp_path, llama_folder, capsys):
    """Learning rate and rank of the processes do not matter; examples, rank, seed and gamma do."""
    changes = {
        "model.learning_rate=1e-3": None,
        "init.memory=low overwrite=true": None,
        "init.stable_gamma=64": "init.stable_gamma",
        "peft.lora_r=4": "peft.lora_r",
        "init.max_length=40": "init.max_length",
        "dataset.data_seed=7": "examples",
        "init.seed=5": "init.seed",
        "peft=qv": "peft.lora_target_modules",
        "model.bf16=true": "model.bf16",
        "init.dtype=bf16": "init.dtype",
    }
    cache = ("model.epochs=0", "dataset.accuracy_examples=0", f"init.cache={tmp_path / 'cache'}")
    finish(small_run(tmp_path, llama_folder, *cache))
    for change, key in changes.items():
        capsys.readouterr()
        finish(small_run(tmp_path, llama_folder, *cache, *change.split()))
        shown = capsys.readouterr().out
        told = next((line for line in shown.splitlines() if line.startswith("init.cache")), shown)
        assert (" from " in told) if key is None else ("computed anew" in told and key in told), (change, told)


def test_changed_code_is_another_key(tmp_path, llama_folder, monkeypatch, capsys):
    cache = ("model.epochs=0", "dataset.accuracy_examples=0", f"init.cache={tmp_path / 'cache'}")
    finish(small_run(tmp_path, llama_folder, *cache))
    monkeypatch.setattr(stages, "source_fingerprint", lambda: "other")
    finish(small_run(tmp_path, llama_folder, *cache, "overwrite=true"))
    assert "the nearest has another code (" in capsys.readouterr().out


def test_content_tells_batches_apart():
    one, two = batches_of(examples(), 2, 0), batches_of(examples(), 2, 0)
    assert content_of(one) == content_of(two) != content_of(one[:2])
    two[1]["labels"][0, -1] += 1
    assert content_of(one) != content_of(two)


# DoRA


@torch.no_grad()
def test_dora_one_starts_where_lora_one_does():
    """m = ||W + s B A|| by row, so m (W + s B A) / ||W + s B A|| = W + s B A; B and A as without DoRA."""
    plain, _ = attach()
    dora, _ = attach("peft=dora")
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
    model, start = attach(f"init={init}", "peft=dora")
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter += torch.randn(parameter.shape, generator=generator) * 0.05
    model.eval()
    trained = model(IDS).logits
    save_adapter(model, tmp_path / "adapter", start.kept)
    loaded = PeftModel.from_pretrained(random_llama(), str(tmp_path / "adapter")).eval()(IDS).logits
    bound = 1e-4 if start.kept else 0.0
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
    run = small_run(tmp_path, llama_folder, "peft=dora", "model.epochs=0", "dataset.accuracy_examples=0")
    folder = finish(run)
    assert folder.path.parent.name.startswith("DoRA-One-r8")
    config = json.loads((folder.adapter / "adapter_config.json").read_text())
    assert config["use_dora"] is True
