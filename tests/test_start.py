"""The start as a whole: its figures, the search for gamma, the cache, and DoRA-One."""

import json
import math

import pytest
import torch
from conftest import adaptation_for, finish, random_llama, random_t5, run_config, small_run
from peft import PeftModel
from test_gradients import autograd_gradients, examples

from lora_one.adaptation import layers as adapters
from lora_one.adaptation.checkpoints import merge_adapter, save_adapter
from lora_one.data.encode import Encoded, batches_of, collate
from lora_one.errors import RunError
from lora_one.initialization import start as start_room
from lora_one.initialization.cache import Cache, content_of
from lora_one.initialization.forward_batches import regrouped
from lora_one.initialization.methods import build_init
from lora_one.initialization.search import line_search
from lora_one.initialization.start import Probe, attach_adapters
from lora_one.initialization.start_warnings import start_warnings
from lora_one.losses import mean_loss
from lora_one.models import BUNDLED
from lora_one.runs import initial_model

IDS = torch.arange(3, 40).reshape(1, -1)


def attach(*overrides, base=None, cached=None, data=None):
    run = run_config(*overrides)
    init = run.init.completed(lambda: 1e-6)
    probe = Probe(batches_of(data or examples(), 2, 0), "example")
    base = random_llama() if base is None else base
    return attach_adapters(base, adaptation_for(run), build_init(init), probe, seed=0, cached=cached)


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
    own = ("init.scale=search", "init.search_examples=0")
    run = small_run(tmp_path, llama_folder, "model.epochs=0", *own, "dataset.accuracy_examples=0")
    record = finish(run).read()["init"]
    energies = record["captured_energy"]["layers"]
    assert len(energies) == 14 and min(energies.values()) == record["captured_energy"]["min"]
    assert record["cached"] is False
    shown = capsys.readouterr().out
    assert f"{record['loss_before']:.4f} -> {record['loss_after']:.4f} (fell by" in shown
    assert f"the first order predicts a fall by {record['predicted_decrease']:.4f})" in shown
    found = record["searched"]
    assert f"searched gamma = {found['gamma']:.4g}, the lowest loss on these examples (" in shown
    assert record["loss_after"] == pytest.approx(min(found["losses"].values()), rel=1e-5)
    assert record["loss_after"] == pytest.approx(found["losses"][str(found["gamma"])], rel=1e-5)


# the search


def saturating(size):
    """A loss that falls at first by 2 a unit of the size, ever more slowly, and then rises: least near 1.29."""
    return 1.5 - 2 * size / (1 + size) + 0.15 * size**2


@pytest.mark.parametrize("scale", [1e-4, 0.03, 1.0, 7.0, 1e5])
@pytest.mark.parametrize("loss", [saturating, lambda size: 1.5 - 2 * size + size**2], ids=["saturating", "parabola"])
def test_search_finds_the_least_loss_whatever_the_unit_of_its_size(scale, loss):
    """Within 1 % of the least loss on a fine grid, by at most 4 evaluations, none of them twice."""
    asked = []

    def loss_at(size):
        asked.append(size)
        return loss(size / scale)

    found, losses = line_search(loss_at, 1.5, 2 / scale)
    least = min(loss(10 ** (k / 200)) for k in range(-400, 400))
    assert losses[found] <= 1.01 * least and losses[found] == min(losses.values())
    assert len(asked) == len(set(asked)) == len(losses) <= 4


def test_search_backs_out_of_losses_that_are_no_numbers():
    """However far the first trial lies beyond the sizes at which the loss is finite."""
    for limit in (0.5, 1e-3):
        found, losses = line_search(lambda size, limit=limit: math.nan if size > limit else 2 - size / limit, 2.0, 1.0)
        assert losses[found] < 2 and any(map(math.isnan, losses.values()))
    with pytest.raises(ValueError, match="not finite at any of the 8 scales"):
        line_search(lambda size: math.inf, 2.0, 1.0)


def test_search_goes_on_until_the_loss_is_below_that_of_no_step():
    """A first-order decrease 1000 times too large, as of a slope that holds only near zero."""
    found, losses = line_search(lambda size: 2 - size + 1e4 * size**2, 2.0, 1.0)
    assert losses[found] < 2.0 and found < 1e-4


def test_search_ends_where_the_next_size_is_one_that_it_knows():
    """The parabola's vertex is exactly the first trial."""
    assert line_search(lambda size: 0.375, 1.0, 1.25) == (1.0, {1.0: 0.375})


def test_search_ends_where_no_step_lowers_the_loss():
    found, losses = line_search(lambda size: 2 + size, 2.0, 1.0)
    assert len(losses) == 8 and found == min(losses)


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
    real, tried = start_room.batches_loss, []

    def loss(model, batches, reduction):
        tried.append(batches)
        return math.nan if fatal or len(tried) == 1 else real(model, batches, reduction)

    monkeypatch.setattr(start_room, "batches_loss", loss)
    own = ("init.scale=search", "init.search_examples=0")
    run = small_run(tmp_path, llama_folder, "model.epochs=0", *own, "dataset.accuracy_examples=0")
    if fatal:
        with pytest.raises(RunError, match="the loss is not finite at any of the 8 scales"):
            finish(run)
        return
    found = finish(run).read()["init"]["searched"]
    assert None in found["losses"].values() and found["losses"][str(found["gamma"])] is not None
    finite = [value for value in found["losses"].values() if value is not None]
    assert found["losses"][str(found["gamma"])] == min(finite)


def test_further_examples_are_searched_on_alone(tmp_path, llama_folder):
    """The slope is the gradient's; the losses are those of other training examples, and so is the loss before."""
    short = ("model.epochs=0", "dataset.accuracy_examples=0")
    own = finish(small_run(tmp_path, llama_folder, *short, "init.search_examples=0")).read()["init"]
    other = finish(small_run(tmp_path, llama_folder, *short, "init.search_examples=6")).read()["init"]
    assert (own["searched"]["other_examples"], other["searched"]["other_examples"]) == (0, 6)
    assert len(other["searched"]["losses"]) <= 3, "the loss before counts as an evaluation"
    assert own["loss_before"] == other["loss_before"] and own["searched"] != other["searched"]
    assert own["loss_after"] == own["searched"]["losses"][str(own["searched"]["gamma"])]
    assert other["loss_after"] != other["searched"]["losses"][str(other["searched"]["gamma"])]


@pytest.mark.parametrize(("size", "others"), [(16, 8), (15, 0)])
def test_by_default_the_search_takes_as_many_others_where_there_are_so_many(tmp_path, llama_folder, size, others):
    short = ("model.epochs=0", "dataset.accuracy_examples=0", f"dataset.max_train_samples={size}")
    record = finish(small_run(tmp_path, llama_folder, *short)).read()["init"]
    assert (record["examples"], record["searched"]["other_examples"]) == (8, others)


def test_default_of_lora_one_searches_and_a_gamma_implies_stable():
    assert run_config().init.scale == run_config("init.scale=search").init.scale == "search"
    assert run_config("init.stable_gamma=128").init == run_config("init.stable_gamma=128", "init.scale=stable").init
    assert run_config("init.direction=LoRA-GA").init.scale == run_config("init=lora_ga").init.scale == "stable"


# losses of a start


@torch.no_grad()
@pytest.mark.parametrize("reduction", ["example", "token"])
def test_regrouped_batches_hold_the_same_examples_with_less_padding(reduction):
    data = examples()
    batches, model = batches_of(data, 3, 0), random_llama()
    grouped = regrouped(batches, 5, 512)
    assert len(grouped) == 1 and len(grouped[0]["labels"]) == len(data)
    assert mean_loss(model, grouped, reduction) == pytest.approx(mean_loss(model, batches, reduction), rel=1e-6)
    lengths = [len(batch["labels"][0]) for batch in regrouped(batches, 5, 2**29 // 64)]  # few logits fit
    assert len(lengths) > 1 and lengths == sorted(lengths, reverse=True)
    assert sum(map(len, (batch["labels"] for batch in regrouped(batches, 5, 512, at_least=3)))) == len(data)
    assert len(regrouped(batches, 5, 512, at_least=3)) == 3


@torch.no_grad()
@pytest.mark.parametrize("longest", [10, 9])
def test_regrouping_keeps_every_label_of_an_encoder_decoder(longest):
    """Also where the longest answer is as long as the longest prompt."""
    rows = [([5] * 10, [7] * 3), ([6] * 4, [8] * longest)]
    data = [Encoded(prompt, answer, decoder_ids=[0, *answer[:-1]]) for prompt, answer in rows]
    batches = [collate(data, 0)]
    (grouped,) = regrouped(batches, 0, 512)
    for name in ("labels", "decoder_input_ids"):
        assert sorted(map(tuple, grouped[name].tolist())) == sorted(map(tuple, batches[0][name].tolist())), name
    model = random_t5()
    assert mean_loss(model, [grouped], "token") == pytest.approx(mean_loss(model, batches, "token"), rel=1e-6)


@torch.no_grad()
def test_a_padding_token_outside_of_the_embeddings_does_not_matter():
    """It is masked in a causal model, so the search pads with any token."""
    base = random_llama()
    base.config.pad_token_id = -1
    probe = Probe(batches_of(examples(), 2, 0), "example")
    assert math.isfinite(start_room.probe_loss(base, probe))


def test_batches_that_padding_could_change_are_left_alone():
    batches = batches_of(examples(), 3, 0)
    hole = [batch | {"attention_mask": batch["attention_mask"].clone()} for batch in batches]
    hole[0]["attention_mask"][0, 1] = 0
    assert regrouped(hole, 0, 512) is hole
    counted = [batch | {"labels": batch["input_ids"]} for batch in batches]  # on padding too
    assert regrouped(counted, 0, 512) is counted
    assert regrouped(batches, None, 512) is batches
    left = [batch | {"attention_mask": batch["attention_mask"].flip(1)} for batch in batches]
    assert regrouped(left, 0, 512) is left
    further = [batch | {"position_ids": batch["input_ids"]} for batch in batches]
    assert regrouped(further, 0, 512) is further


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("init.stable_gamma=2",), "raised the loss on its 8 examples from"),
        (("init.stable_gamma=2",), "leave out init.stable_gamma (the scale is then searched for), or raise it (now 2)"),
        (("init.scale=unit",), "leave out init.scale=unit (the scale is then searched for)"),
        (("init.direction=LoRA-SB", "init.eta=1"), "lower init.eta (now 1)"),
    ],
)
def test_a_start_that_harms_says_so(tmp_path, capsys, overrides, said):
    """On the screen, once, and in run.json, with the two losses and the key to change."""
    run = small_run(tmp_path, BUNDLED / "tiny", "model.epochs=0", "dataset.accuracy_examples=0", *overrides)
    record = finish(run).read()["init"]
    (warning,) = record["warnings"]
    assert said in warning and record["loss_after"] > record["loss_before"]
    assert f"{record['loss_before']:.4f}" in warning and f"{record['loss_after']:.4f}" in warning
    shown = capsys.readouterr().out
    assert shown.count(f"WARNING: {warning}") == 2, "at once, and in the summary at the end"
    assert f"(rose by {record['loss_after'] - record['loss_before']:.4f}; the first order predicts a fall by" in shown


def test_a_step_larger_than_the_loss_is_warned_of_even_where_the_loss_fell():
    record = {"method": "LoRA-One", "examples": 8, "loss_before": 2.0, "predicted_decrease": 2.5, "searched": None}
    init = run_config("init.stable_gamma=128").init
    (warning,) = start_warnings(init, record | {"loss_after": 1.9})
    assert "2.5000" in warning and "2.0000" in warning and "1.9000" in warning and "(now 128)" in warning
    assert start_warnings(init, record | {"loss_after": 1.9, "predicted_decrease": 1.5}) == []
    assert start_warnings(init, record | {"loss_after": 1.9, "searched": {"gamma": 64}}) == []
    assert start_warnings(init, record | {"loss_after": 2.001, "predicted_decrease": 0.0}) == []  # rounding
    assert len(start_warnings(init, record | {"loss_after": 2.01, "searched": {"gamma": 64}})) == 1


@pytest.mark.parametrize("overrides", [(), ("init.direction=LoRA-GA",), ("init=default",), ("init=svd",)])
def test_a_default_start_warns_of_nothing(tmp_path, llama_folder, overrides):
    run = small_run(tmp_path, llama_folder, "model.epochs=0", "dataset.accuracy_examples=0", *overrides)
    assert finish(run).read()["init"]["warnings"] == []


@pytest.mark.parametrize(
    ("overrides", "remedy"),
    [
        (("init.stable_gamma=1e-30",), "leave out init.stable_gamma"),
        (("init=gaussian", "init.lora_A_std=1e30", "init.lora_B_std=1e30", "init.lora_B=gaussian"), "lora_A_std"),
    ],
)
def test_a_start_that_is_not_finite_is_one_message(tmp_path, llama_folder, overrides, remedy):
    with pytest.raises(RunError, match=rf"is (nan|inf) after the start of .*{remedy}"):
        finish(small_run(tmp_path, llama_folder, "model.epochs=0", *overrides))


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
    assert (
        known.relative_shift == pytest.approx(start.relative_shift)
        and known.initial_factors.keys() == start.initial_factors.keys()
    )
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
    with pytest.raises(RunError, match=r"init\.cache=.*file cannot be written .*choose another folder"):
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
    monkeypatch.setattr(initial_model, "source_fingerprint", lambda: "other")
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
    plain, _ = attach("init.stable_gamma=128")
    dora, _ = attach("peft=dora", "init.stable_gamma=128")
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
    run = small_run(tmp_path, llama_folder, "peft=dora", "model.epochs=0", "dataset.accuracy_examples=0")
    folder = finish(run)
    assert folder.path.parent.name.startswith("DoRA-One-r8")
    config = json.loads((folder.adapter / "adapter_config.json").read_text())
    assert config["use_dora"] is True
