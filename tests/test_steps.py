"""Every way of holding gradients gives the steps of autograd's full-weight gradient, in the memory it promises."""

import weakref
from collections import Counter

import pytest
import torch
from conftest import Experts, Shared, adaptation_for, random_llama, random_roberta, run_config
from test_gradients import examples, linear_layers
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from lora_one.adaptation import layers as adapters
from lora_one.adaptation.checkpoints import merge_adapter
from lora_one.data.encode import batches_of
from lora_one.errors import RunError, UsageError
from lora_one.initialization import gradients as gradient_room
from lora_one.initialization import holding
from lora_one.initialization import low_rank_step as steps
from lora_one.initialization.gradients import mean_gradients
from lora_one.initialization.holding import how_to_hold
from lora_one.initialization.low_rank_step import StepSettings, low_rank_steps
from lora_one.initialization.methods import build_init
from lora_one.initialization.sketch import sketched_steps
from lora_one.initialization.start import Probe, attach_adapters
from lora_one.losses import loss_count, loss_sum, model_logits, targets

RANK = 4
HOLDS = ["device", "cpu", "layer"]


def wide_llama():
    """Layers of 48 to 160 rows and columns: more than the 28 columns of a sketch for rank 4."""
    return random_llama(hidden_size=96, intermediate_size=160)


def autograd(model, layers, batches, reduction="example"):
    """G (m, n) of each layer, by asking every weight for its gradient."""
    start = model.get_input_embeddings().weight
    for weight in [start, *(layer.weight for layer in layers.values())]:
        weight.requires_grad_(True)
        weight.grad = None
    count = sum(loss_count(targets(batch), reduction) for batch in batches)
    for batch in batches:
        (loss_sum(model_logits(model, batch), targets(batch), reduction) / count).backward()
    found = {n: layer.weight.grad.T if isinstance(layer, Conv1D) else layer.weight.grad for n, layer in layers.items()}
    for weight in [start, *(layer.weight for layer in layers.values())]:
        weight.requires_grad_(False)
        weight.grad = None
    return found


def gradients(model, layers, batches, hold, checkpointing=False):
    found = {}

    def consume(name, G):
        assert name not in found
        found[name] = G

    mean_gradients(model, layers, batches, "example", consume, place=hold, checkpointing=checkpointing)
    return found


def assert_same(found, expected, bound=1e-5):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        error = (value - expected[name]).norm() / expected[name].norm()
        assert error <= bound, (name, float(error))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("memory", "batch_size", "hold"),
    [
        ("fast", 5, "device"),
        ("auto", 5, "layer"),
        ("low", 5, "layer"),
        ("fast", 2, "device"),
        ("auto", 2, "device"),
        ("low", 2, "sketch"),
        ("low", 1, "sketch"),
    ],
)
def test_same_steps_as_the_exact_svd_of_autograds_gradient(memory, batch_size, hold, checkpointing):
    model = wide_llama()
    layers, batches = linear_layers(model), batches_of(examples(), batch_size, 0)
    expected = {n: torch.linalg.svd(G, full_matrices=False) for n, G in autograd(model, layers, batches).items()}
    settings = StepSettings(singular=RANK, tolerance=1e-8, memory=memory, checkpointing=checkpointing)
    assert how_to_hold(layers, batches, settings.memory, whole=settings.transform is not None).place == hold
    found = {}
    report = low_rank_steps(model, layers, batches, "example", settings, found.__setitem__)
    assert (report.examples, report.memory) == (5, hold)
    products = {name: step.U * step.S @ step.Vh for name, step in found.items()}
    exact = {name: U[:, :RANK] * S[:RANK] @ Vh[:RANK] for name, (U, S, Vh) in expected.items()}
    assert_same(products, exact, 1e-5)
    for name, step in found.items():
        S = expected[name][1]
        energy = float(S[:RANK].square().sum() / S.square().sum())
        outside = float(S[2 * (RANK + 8) :].square().sum() / S.square().sum())  # what the sketch can only estimate
        assert step.energy == pytest.approx(energy, rel=1e-4 + outside), name
        torch.testing.assert_close(step.S, S[:RANK], rtol=1e-4, atol=0)


@pytest.mark.parametrize("singular", [RANK, 2 * RANK])
def test_every_memory_mode_gives_the_same_product(singular):
    """U diag(S) Vh to 1e-5 of its norm at the default tolerance, above and below the size of the exact SVD."""
    model = random_llama(hidden_size=320, intermediate_size=400)  # k_proj and v_proj are (160, 320)
    layers = linear_layers(model)
    products = {}
    for memory, batch_size in (("fast", 2), ("low", 2), ("low", 5)):
        batches, settings = batches_of(examples(), batch_size, 0), StepSettings(singular=singular, memory=memory)
        hold, found = how_to_hold(layers, batches, settings.memory, whole=settings.transform is not None).place, {}
        low_rank_steps(model, layers, batches, "example", settings, found.__setitem__)
        products[hold] = {name: step.U * step.S @ step.Vh for name, step in found.items()}
    assert products.keys() == {"device", "sketch", "layer"}
    assert_same(products["sketch"], products["device"])
    assert_same(products["layer"], products["device"])


@pytest.mark.parametrize(("memory", "batch_size"), [("fast", 2), ("low", 5), ("low", 2)])
def test_low_rank_steps_are_taken_outside_of_autocast(memory, batch_size):
    model = random_llama()
    layers, batches = linear_layers(model), batches_of(examples(), batch_size, 0)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            steps_found = {}
            settings = StepSettings(singular=RANK, memory=memory)
            low_rank_steps(model, layers, batches, "example", settings, steps_found.__setitem__)
            found.append(steps_found)
    outside, inside = found
    assert all(
        torch.equal(step.U, inside[name].U) and torch.equal(step.S, inside[name].S) for name, step in outside.items()
    )


def test_energy_of_a_sketch_is_known_up_to_what_it_leaves_out():
    """Over many seeds the estimate is without bias, and off by no more than the share of G outside the subspace."""
    model = wide_llama()
    layers = {"model.layers.0.mlp.up_proj": model.model.layers[0].mlp.up_proj}
    batches = batches_of(examples(), 2, 0)
    (G,) = autograd(model, layers, batches).values()
    shares = torch.linalg.svdvals(G).square() / G.square().sum()
    energy, outside = float(shares[:RANK].sum()), float(shares[RANK + 24 :].sum())
    found = []
    for seed in range(12):
        sketched_steps(
            model,
            layers,
            batches,
            "example",
            lambda _, step: found.append(step.energy),
            singular_of=lambda name: RANK,
            tolerance=1e-3,
            seed=seed,
        )
    errors = torch.tensor(found) / energy - 1
    assert outside > 1e-3  # or nothing would be estimated here
    assert errors.abs().max() <= 0.5 * outside + 2e-3, (errors, outside)
    assert errors.mean().abs() <= 0.2 * outside + 1e-3


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("hold", HOLDS)
def test_every_hold_gives_autograds_gradient(hold, checkpointing):
    model = random_llama()
    layers = linear_layers(model)
    batches = batches_of(examples(), 5 if hold == "layer" else 2, 0)
    expected = autograd(model, layers, batches_of(examples(), 1, 0))
    assert_same(gradients(model, layers, batches, hold, checkpointing), expected)


def test_transform_keeps_fullwhole():
    """A transform needs G itself: with little memory and several batches they wait on the CPU."""
    model = random_llama()
    layers, batches = linear_layers(model), batches_of(examples(), 2, 0)
    settings = StepSettings(singular=RANK, memory="low", transform=torch.sign)
    assert how_to_hold(layers, batches, settings.memory, whole=settings.transform is not None).place == "cpu"
    found = {}
    low_rank_steps(model, layers, batches, "example", settings, found.__setitem__)
    for name, G in autograd(model, layers, batches).items():
        S = torch.linalg.svdvals(G.sign())
        torch.testing.assert_close(found[name].S, S[:RANK], rtol=1e-3, atol=0)


# memory

SEVEN_B = 32 * (4 * [4 * 4096 * 4096] + 3 * [4 * 4096 * 11008])  # bytes of Llama-2-7B's gradients: 26 GB
GB = 10**9


@pytest.mark.parametrize(
    ("batches", "length", "device", "host", "whole", "place", "groups"),
    [
        (8, 1024, 60, 200, False, "device", 1),  # all fit
        (8, 1024, 5, 200, False, "device", 6),  # 6 passes take less than 208 GB over the link
        (8, 1024, 1, 200, False, "sketch", 0),  # 11 passes take less than 28, and than 208 GB over the link
        (8, 1024, 0.5, 200, True, "cpu", 0),  # no sketch for a transform, and 60 passes take longer
        (8, 1024, 0, 0, False, "sketch", 0),
        (8, 1024, 0, 0, True, "cpu", 0),
        (8, 65536, 1, 200, False, "cpu", 0),  # long passes: the copies cost less
    ],
)
def test_gradients_wait_where_the_predicted_time_is_least(batches, length, device, host, whole, place, groups):
    rooms = {"device_room": int(device * GB), "host_room": host * GB}
    found = holding.fastest(batches, batches * length, SEVEN_B, **rooms, speed=holding.SPEEDS["cuda"], whole=whole)
    assert found.place == place
    if place == "device":
        assert (found.room is None) == (groups == 1)
        assert groups == 1 or len(holding._groups(SEVEN_B, found.room)) == groups


def test_layers_in_groups_give_the_same_steps_in_less_memory(monkeypatch):
    """A pass for each group; never more gradients at once than the room holds."""
    model = wide_llama()
    layers, batches = linear_layers(model), batches_of(examples(), 2, 0)
    whole, found = {}, {}
    low_rank_steps(model, layers, batches, "example", StepSettings(singular=RANK), whole.__setitem__)
    room = 3 * max(map(holding.gradient_bytes, layers.values()))
    monkeypatch.setattr(steps, "how_to_hold", lambda *_, **__: holding.Holding("device", room))
    monkeypatch.setattr(gradient_room, "SMALL", 0)  # sums in fp32, which the watch counts
    with Alive(layers) as watch:
        low_rank_steps(model, layers, batches, "example", StepSettings(singular=RANK), found.__setitem__)
    assert watch.bytes <= room + 2 * max(map(holding.gradient_bytes, layers.values()))
    assert list(found) == list(layers)
    assert_same({n: s.U * s.S @ s.Vh for n, s in found.items()}, {n: s.U * s.S @ s.Vh for n, s in whole.items()})


class Alive(TorchDispatchMode):
    """Counts the fp32 matrices of given shapes, made while it is open, that are alive at once; weights aside."""

    def __init__(self, layers):
        super().__init__()
        self.shapes = {tuple(layer.weight.shape) for layer in layers.values()}
        self.shapes |= {shape[::-1] for shape in self.shapes}
        self.weights = {layer.weight.untyped_storage().data_ptr() for layer in layers.values()}
        self.alive, self.most, self.bytes = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.dtype == torch.float32
                and tuple(tensor.shape) in self.shapes
            ):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.weights:
                    self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                del storage
        del tensor
        self.alive = {key: kept for key, kept in self.alive.items() if not kept[0].expired()}
        self.most = max(self.most, len(self.alive))
        self.bytes = max(self.bytes, sum(size for _, size in self.alive.values()))
        return result


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("hold", "most"), [("device", 14), ("layer", 2)])
def test_layers_are_freed_one_by_one(hold, most, checkpointing):
    """place=device holds all 14 gradients at the end; place=layer never more than two."""
    model = wide_llama()
    layers, batches = linear_layers(model), batches_of(examples(), 5, 0)
    with Alive(layers) as watch:
        mean_gradients(model, layers, batches, "example", lambda n, G: None, place=hold, checkpointing=checkpointing)
    assert watch.most <= most and (hold == "layer" or watch.most == most)
    largest = 4 * max(layer.weight.numel() for layer in layers.values())
    assert hold == "device" or watch.bytes <= 2 * largest


def test_factorised_fullare_freed(monkeypatch):
    """Through the whole low-rank step: when a layer is factorised no other layer's G is alive."""
    model = wide_llama()
    layers, batches = linear_layers(model), batches_of(examples(), 5, 0)
    handed, alive = [], []
    original = steps.factorised

    def factorised(name, G, settings):
        handed.append(weakref.ref(G))
        alive.append(sum(ref() is not None for ref in handed))
        return original(name, G, settings)

    monkeypatch.setattr(steps, "factorised", factorised)
    low_rank_steps(model, layers, batches, "example", StepSettings(singular=RANK, memory="low"), lambda n, step: None)
    assert alive == [1] * 14


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_sketch_never_makes_a_gradient(checkpointing):
    model = random_llama(hidden_size=256, intermediate_size=400)  # no shape is that of a Krylov basis, (n, 11 j)
    layers, batches = linear_layers(model), batches_of(examples(), 2, 0)
    settings = StepSettings(singular=3, memory="low", checkpointing=checkpointing)
    with Alive(layers) as watch:
        low_rank_steps(model, layers, batches, "example", settings, lambda n, step: None)
    assert watch.most == 0


# gradients of low rank


def rows_of_a_head(model, count):
    """Examples of a classification head, whose first layer sees one token of each: G has rank ``count``."""
    ids = torch.randint(3, 64, (count, 9), generator=torch.Generator().manual_seed(1))
    rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(count) % 2}
    return [{name: value[i : i + 1] for name, value in rows.items()} for i in range(count)]


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("count", [1, 2])
def test_directions_that_a_gradient_lacks_are_named_and_not_noise(memory, count):
    """S is exactly 0 there, the vectors are orthonormal, and the same wherever the gradient was held."""
    model = random_roberta(64).requires_grad_(False)
    layers = {"classifier.dense": model.classifier.dense, "query": model.roberta.encoder.layer[0].attention.self.query}
    batches, expected, found = rows_of_a_head(model, count), {}, {}
    message = rf"1 of 2 layers have fewer usable directions than wanted: classifier\.dense \({count} of {RANK}\)\."
    for mode, steps_found in (("fast", expected), (memory, found)):
        with pytest.warns(UserWarning, match=message) as raised:
            settings = StepSettings(singular=RANK, memory=mode)
            low_rank_steps(model, layers, batches, "example", settings, steps_found.__setitem__)
        assert len(raised) == 1
    step = found["classifier.dense"]
    assert step.usable == count and not step.S[count:].any() and not step.slopes[count:].any()
    assert found["query"].usable == RANK
    for vectors in (step.U, step.Vh.T):
        torch.testing.assert_close(vectors.T @ vectors, torch.eye(RANK), atol=1e-5, rtol=0)
    torch.testing.assert_close(step.U, expected["classifier.dense"].U, atol=1e-4, rtol=0)
    torch.testing.assert_close(step.Vh, expected["classifier.dense"].Vh, atol=1e-4, rtol=0)


# models


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("hold", [*HOLDS, "sketch"])
def test_a_layer_used_several_times(hold, reentrant):
    plain, model = Shared(), Shared(reentrant)
    names = ("shared", "once")
    batches = batches_of(examples(vocabulary=64), 5 if hold == "layer" else 2, 0)
    expected = autograd(plain, {name: getattr(plain, name) for name in names}, batches)
    layers = {name: getattr(model, name) for name in names}
    if hold != "sketch":
        assert_same(gradients(model, layers, batches, hold), expected)
        return
    found = {}
    settings = StepSettings(singular=16, tolerance=1e-6, memory="low")
    low_rank_steps(model, layers, batches, "example", settings, found.__setitem__)
    assert_same({name: step.U * step.S @ step.Vh for name, step in found.items()}, expected)


class Tied(Shared):
    """A weight shared by two layers: each has its own adapter, so its own gradient."""

    def __init__(self):
        super().__init__()
        self.once.weight = self.shared.weight


@pytest.mark.parametrize("hold", HOLDS)
def test_layers_that_share_a_weight(hold):
    tied, untied = Tied(), Shared()
    untied.once.weight = nn.Parameter(untied.shared.weight.clone(), requires_grad=False)
    batches = batches_of(examples(vocabulary=64), 5, 0)
    expected = autograd(untied, {"shared": untied.shared, "once": untied.once}, batches)
    assert_same(gradients(tied, {"shared": tied.shared, "once": tied.once}, batches, hold), expected)


def random_gpt2():
    torch.manual_seed(0)
    settings = {"vocab_size": 512, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.1}
    return GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=1, **settings)).requires_grad_(False).eval()


@pytest.mark.filterwarnings("ignore:.*fewer usable directions")  # 32 are asked for, layer norms leave 31
@pytest.mark.parametrize("hold", [*HOLDS, "sketch"])
def test_conv1d_stores_its_weight_the_other_way_round(hold):
    model = random_gpt2()
    layers = adapters.target_layers(model, run_config().peft)
    assert Counter(name.rpartition(".")[2] for name in layers) == {"c_attn": 2, "c_proj": 4, "c_fc": 2}
    batches = batches_of(examples(), 5 if hold == "layer" else 2, 0)
    expected = autograd(model, layers, batches)
    assert expected["transformer.h.0.attn.c_attn"].shape == (96, 32)
    if hold != "sketch":
        assert_same(gradients(model, layers, batches, hold), expected)
        return
    found = {}
    settings = StepSettings(singular=32, tolerance=1e-6, memory="low")
    low_rank_steps(model, layers, batches, "example", settings, found.__setitem__)
    assert_same({name: step.U * step.S @ step.Vh for name, step in found.items()}, expected)


@torch.no_grad()
@pytest.mark.parametrize("init", ["gradient init.stable_gamma=128", "svd"])
def test_conv1d_starts_where_the_method_says(init):
    """LoRA-One: W + s B A, B A from -G; svd: a changed base that leaves the function as it was."""
    run, batches = run_config(*f"init={init}".split()), batches_of(examples(), 2, 0)
    base, ids = random_gpt2(), torch.arange(3, 40)[None]
    expected = base(ids).logits
    weights = {name: layer.weight.T.clone() for name, layer in adapters.target_layers(base, run.peft).items()}
    probe = Probe(batches, "example")
    model, start = attach_adapters(base, adaptation_for(run), build_init(run.init), probe, seed=0)
    moved = {}
    for name, layer in adapters.lora_layers(model).items():
        B, A = layer.lora_B["default"].weight, layer.lora_A["default"].weight
        moved[name] = layer.scaling["default"] * B @ A
        assert start.relative_shift[name] == pytest.approx(float(moved[name].norm() / weights[name].norm()), rel=1e-4)
        view = adapters.layer_view(name, layer, 0)
        assert view.shape == view.weight().shape == weights[name].shape
    if init == "svd":
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
        return
    with torch.enable_grad():
        fresh = random_gpt2()
        full = autograd(fresh, adapters.target_layers(fresh, run.peft), batches)
    for name, G in full.items():
        U, S, Vh = torch.linalg.svd(-G, full_matrices=False)
        expected = 16 / 8**0.5 * U[:, :8] * S[:8] @ Vh[:8] / (128 * S[0])
        torch.testing.assert_close(moved[name], expected, rtol=1e-3, atol=1e-6, msg=name)
    merged = merge_adapter(model)
    for name, layer in adapters.target_layers(merged, run.peft).items():
        torch.testing.assert_close(layer.weight.T, weights[name] + moved[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("hold", HOLDS)
def test_encoder_decoder(hold, checkpointing):
    """Labels beside decoder_input_ids, so that the logit at t predicts the label at t + 1 as everywhere."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **sizes)).requires_grad_(False).eval()
    layers = adapters.target_layers(model, run_config().peft)
    assert len(layers) == 2 * 6 + 2 * 10
    generator = torch.Generator().manual_seed(1)
    batch = {
        "input_ids": torch.randint(2, 64, (3, 9), generator=generator),
        "attention_mask": torch.tensor([[1] * 9, [1] * 6 + [0] * 3, [1] * 8 + [0]]),
        "decoder_input_ids": torch.randint(2, 64, (3, 7), generator=generator),
    }
    batch["decoder_input_ids"][:, 0] = 0
    batch["labels"] = batch["decoder_input_ids"].clone()
    batch["labels"][1, 5:] = -100
    expected = autograd(model, layers, [batch])
    assert_same(gradients(model, layers, [batch], hold, checkpointing), expected)


def test_checkpointing_leaves_a_block_as_it_was():
    """Also one whose forward was replaced on the instance, as placement over devices does."""
    model = random_llama()
    first, second = model.model.layers
    own = first.forward
    first.forward = lambda *inputs, **named: own(*inputs, **named)
    mine = first.forward
    gradients(model, linear_layers(model), batches_of(examples(), 2, 0), "device", checkpointing=True)
    assert first.forward is mine and "forward" not in vars(second)


# mixtures of experts


def random_mixtral():
    torch.manual_seed(0)
    settings = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    config = MixtralConfig(vocab_size=512, hidden_size=32, intermediate_size=48, initializer_range=0.1, **settings)
    return MixtralForCausalLM(config).requires_grad_(False).eval()


def test_fused_experts_are_named_not_skipped_in_silence():
    run, model = run_config(), random_mixtral()
    probe = Probe(batches_of(examples(), 2, 0), "example")
    with pytest.warns(UserWarning, match=r"2 tensors of fused experts are left.*experts\.gate_up_proj is the first"):
        model, _ = attach_adapters(model, adaptation_for(run), build_init(run.init), probe, seed=0)
    assert {name.rpartition(".")[2] for name in adapters.lora_layers(model)} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    with pytest.raises(UsageError, match=r"gate_up_proj is one tensor of all experts in this model.*valid: k_proj"):
        adapters.target_layers(random_mixtral(), run_config("peft.lora_target_modules=[gate_up_proj]").peft)


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("batch_size", [2, 5])
def test_unused_expert_is_named(memory, batch_size):
    model = Experts()
    layers = {f"experts.{index}": expert for index, expert in enumerate(model.experts)}
    batches = batches_of(examples(vocabulary=64), batch_size, 0)
    message = r"experts\.1 got no gradient \(nor did 1 more\): .*take more of them \(init\.iters\), or leave it out"
    with pytest.raises(ValueError, match=message):
        low_rank_steps(
            model, layers, batches, "example", StepSettings(singular=RANK, memory=memory), lambda n, step: None
        )


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("batch_size", [2, 5])
def test_gradient_that_is_zero_or_no_number_is_named(memory, batch_size):
    model = Experts(used=(0, 1))
    model.head.weight.zero_()
    layers, batches = {"first": model.experts[0]}, batches_of(examples(vocabulary=64), batch_size, 0)
    settings = StepSettings(singular=RANK, memory=memory)
    with pytest.raises(ValueError, match="the gradient of layer first is zero"):
        low_rank_steps(model, layers, batches, "example", settings, lambda n, step: None)
    model = Experts(used=(0, 1))
    model.words.weight.mul_(1e30)  # tanh keeps the loss finite
    model.experts[0].weight.mul_(1e-30)
    model.head.weight.mul_(1e10)
    layers = {"first": model.experts[0]}
    with pytest.raises(ValueError, match=r"layer first: .*not finite"):
        low_rank_steps(model, layers, batches, "example", settings, lambda n, step: None)


def test_errors_reach_the_user_as_run_errors(monkeypatch):
    monkeypatch.setattr(steps, "factorised", lambda *_: (_ for _ in ()).throw(ValueError("layer x: why")))
    run = run_config()
    probe = Probe(batches_of(examples(), 2, 0), "example")
    with pytest.raises(RunError, match="init: layer x: why"):
        attach_adapters(random_llama(), adaptation_for(run), build_init(run.init), probe, seed=0)
