"""A start with ranks by layer as a whole: in a run, in the library, saved, merged, resumed and cached."""

import json
import math

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from lora_one import initialize_adapters, save_adapter
from lora_one.adaptation import layers as adapters
from lora_one.data.encode import batches_of
from lora_one.errors import RunError, UsageError
from lora_one.initialization.cache import Cache
from lora_one.losses import mean_loss
from lora_one.models import load_model
from tests.helpers.examples import autograd_gradients, examples
from tests.helpers.library import assert_close, logits, lora, move
from tests.helpers.models import random_llama
from tests.helpers.runs import attach_llama, finish, run_config, small_run, straight_and_resumed

GORA = ("init=gora", "init.min_rank=2", "init.max_rank=16", "peft.lora_r=4")


def importances(gradients):
    return {n: float((random_llama().get_submodule(n).weight * G).abs().mean()) for n, G in gradients.items()}


@torch.no_grad()
def test_ranks_scaling_and_factors_follow_the_gradient_of_autograd():
    data = examples()
    with torch.enable_grad():
        gradients = autograd_gradients(random_llama(), data, "example")
    model, start = attach_llama(*GORA, data=data)
    ranks = start.solution.ranks
    assert len(set(ranks.values())) > 2 and min(ranks.values()) >= 2
    weights = importances(gradients)
    total = sum(rank * sum(gradients[name].shape) for name, rank in ranks.items())
    budget = 4 * sum(sum(G.shape) for G in gradients.values())
    assert 0 <= budget - total < max(sum(G.shape) for G in gradients.values())
    expected = 0.0
    for name, layer in adapters.lora_layers(model).items():
        r, A, B = ranks[name], layer.lora_A["default"].weight, layer.lora_B["default"].weight
        G, n = gradients[name], gradients[name].shape[1]
        assert A.shape == (r, n) and B.shape == (G.shape[0], r) and layer.scaling["default"] == 16 / math.sqrt(r)
        step = -0.05 * math.sqrt(n / r) * G @ torch.linalg.pinv(A) @ A
        torch.testing.assert_close(layer.scaling["default"] * B @ A, step, rtol=1e-3, atol=1e-6)
        expected -= float((G * step).sum())
    same = [name for name in ranks if gradients[name].shape == (32, 32)]
    assert max(same, key=weights.get) == max(same, key=lambda name: (ranks[name], weights[name]))
    assert start.solution.predicted_decrease == pytest.approx(expected, rel=1e-3) and expected > 0
    after = mean_loss(model, batches_of(data, 2, 0), "example")
    assert start.solution.examples.loss - after == pytest.approx(expected, rel=0.2)


def test_a_run_saves_merges_and_records_its_ranks(tmp_path, llama_folder, capsys):
    run = small_run(tmp_path, llama_folder, *GORA, "model.saving=true")
    folder = finish(run)
    record = folder.read()
    ranks = record["init"]["ranks"]
    assert record["init"]["method"] == "GoRA" and record["init"]["examples"] == 32
    assert folder.path.parent.name.startswith("GoRA-r4-a16-r2-16-step0.05-lr")
    assert f"ranks {min(ranks.values())} to {max(ranks.values())}" in capsys.readouterr().out
    shapes = {name: load_model(str(llama_folder), dtype="fp32").get_submodule(name).weight.shape for name in ranks}
    assert record["trainable_parameters"] == sum(rank * sum(shapes[name]) for name, rank in ranks.items())
    assert record["trainable_parameters"] <= 4 * sum(map(sum, shapes.values()))
    tensors = load_file(folder.adapter / "adapter_model.safetensors")
    for name, rank in ranks.items():
        assert tensors[f"base_model.model.{name}.lora_A.weight"].shape == (rank, shapes[name][1])
    ids = torch.arange(2, 40).reshape(1, -1)
    base = load_model(str(llama_folder), dtype="fp32")
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(base, str(folder.adapter)).eval()(ids).logits
        merged = load_model(str(folder.merged), dtype="auto")(ids).logits
    assert (adapted - merged).abs().max() <= 1e-4 * adapted.abs().max()
    card = (folder.adapter / "README.md").read_text()
    others = [rank for rank in ranks.values() if rank != 4]
    assert f"rank in training: {min(ranks.values())} to {max(ranks.values())} by layer, within" in card
    assert f"- rank: 4, except {len(others)} layers with {min(others)} to {max(others)}" in card


def test_a_resumed_run_has_the_same_ranks(tmp_path, llama_folder, monkeypatch):
    changes = (*GORA, "init.iters=8", "model.epochs=2", "peft.lora_dropout=0.1")
    straight, resumed = straight_and_resumed(tmp_path, llama_folder, changes, monkeypatch)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (resumed.adapter / name).read_bytes() == (straight.adapter / name).read_bytes()


def test_the_dry_run_says_that_the_parameters_are_a_budget(tmp_path, llama_folder, capsys):
    finish(small_run(tmp_path, llama_folder, *GORA, "dry_run=true"))
    said = capsys.readouterr().out
    assert "trainable parameters at most; the initialisation distributes them over the layers by rank" in said


def test_a_cached_start_has_its_ranks(tmp_path):
    cache = Cache(tmp_path, {"a": 1}, say=lambda _: None)
    first, start = attach_llama(*GORA, cached=cache)
    again, read = attach_llama(*GORA, cached=cache)
    assert read.solution.cached and read.solution.ranks == start.solution.ranks
    assert all(torch.equal(one, two) for one, two in zip(first.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_memory_and_batches_do_not_matter(memory, size):
    """One layer at a time for one batch; on the device or the host for several."""
    _, expected = attach_llama(*GORA)
    batches = batches_of(examples(), size, 0)
    model = initialize_adapters(
        random_llama(), lora(target_modules="all-linear"), batches, method="gora", examples=None, memory=memory,
        min_rank=2, max_rank=16, seed=0,
    )  # fmt: skip
    for name, layer in adapters.lora_layers(model).items():
        found = expected.solution.factors[name]
        torch.testing.assert_close(layer.lora_A["default"].weight.detach(), found.A)
        product = layer.scaling["default"] * layer.lora_B["default"].weight.detach() @ found.A
        # alpha is 8 with alpha / r in the LoraConfig, and 16 with rsLoRA in the run: the step is the same
        torch.testing.assert_close(product, 16 / len(found.A) ** 0.5 * found.B @ found.A, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True, "alpha_pattern": {"q_proj": 4}}, {"use_dora": True}])
def test_the_library_sets_the_rank_pattern(changes, tmp_path):
    base, batches = random_llama(), batches_of(examples(), 2, 0)
    config = lora(**changes)
    model = initialize_adapters(base, config, batches, method="gora", examples=None, min_rank=1)
    pattern = model.peft_config["default"].rank_pattern
    assert len(pattern) >= 2 and not config.rank_pattern
    layers = adapters.lora_layers(model)
    for name, layer in layers.items():
        r = layer.r["default"]
        alpha = config.alpha_pattern.get("q_proj", 8) if name.endswith("q_proj") else 8
        assert layer.scaling["default"] == pytest.approx(alpha / (math.sqrt(r) if config.use_rslora else r))
        assert r == pattern.get(name, 4) == layer.lora_A["default"].weight.shape[0]
    move(model)
    trained = logits(model)
    save_adapter(model, tmp_path / "adapter")
    assert_close(logits(PeftModel.from_pretrained(random_llama(), tmp_path / "adapter")), trained)
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["rank_pattern"] == pattern


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"rank_pattern": {"q_proj": 2}}, "it chooses the rank of each layer: remove rank_pattern"),
        ({"layer_replication": [(0, 2), (1, 2)]}, "remove layer_replication"),
    ],
)
def test_the_library_refuses_what_it_cannot_combine(config, said):
    with pytest.raises(UsageError, match=rf"method=gora is not possible here: .*{said}"):
        initialize_adapters(random_llama(), lora(**config), batches_of(examples(), 2, 0), method="gora")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("init.min_rank=0",), r"init\.min_rank=0 is out of range: it must be at least 1, because .* rank 0"),
        (("peft.lora_r=3", "init.min_rank=4"), r"peft\.lora_r=3 is the mean rank .* in \[init\.min_rank=4, init\.max"),
        (("peft.lora_r=8", "init.max_rank=6"), r"peft\.lora_r=8 is the mean rank .*init\.max_rank=6\]: change one"),
        (("init.max_rank=0",), r"init\.max_rank=0 is out of range"),
    ],
)
def test_a_budget_that_cannot_be_distributed_is_refused(overrides, said):
    with pytest.raises(UsageError, match=said):
        attach_llama("init=gora", *overrides)


def test_a_weight_that_is_not_finite_is_named_and_the_base_stays():
    base = random_llama()
    names = [name for name, _ in base.named_modules()]
    base.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(RunError, match="init: "):
        attach_llama(*GORA, base=base)
    assert [name for name, _ in base.named_modules()] == names


def test_a_sharded_base_is_refused():
    with pytest.raises(UsageError, match=r"model\.sharded=True does not work with GoRA, which reads"):
        run_config("init=gora", "model.sharded=true", "dataset.accuracy_examples=0")
