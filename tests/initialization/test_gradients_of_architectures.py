"""Every way of holding gradients gives the steps of autograd's full-weight gradient, in the memory it promises."""

from collections import Counter

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    FalconConfig,
    FalconForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from lora_one.adaptation import layers as adapters
from lora_one.adaptation.merging import merge_adapter
from lora_one.data.encode import batches_of
from lora_one.errors import UsageError
from lora_one.initialization.low_rank_step import StepSettings, low_rank_steps
from lora_one.initialization.methods import build_init
from lora_one.initialization.solution import Probe
from lora_one.initialization.start import attach_adapters
from tests.helpers.examples import HOLDS, RANK, assert_same, autograd, examples, gradients, linear_layers
from tests.helpers.models import Experts, Shared, random_gpt2, random_llama, random_mixtral
from tests.helpers.runs import adaptation_for, run_config


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


@pytest.mark.parametrize("hold", HOLDS)
def test_outputs_that_the_model_changes_in_place(hold):
    """Falcon adds the output of the attention to that of the MLP."""

    def falcon():
        torch.manual_seed(0)
        shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
        config = FalconConfig(**shape, parallel_attn=True, bias=True, new_decoder_architecture=False, multi_query=True)
        return FalconForCausalLM(config).requires_grad_(False).eval()

    plain, model = falcon(), falcon()
    batches = batches_of(examples(vocabulary=64), 5, 0)
    expected = autograd(plain, linear_layers(plain), batches)
    assert_same(gradients(model, linear_layers(model), batches, hold), expected)


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("version", ["deberta", "deberta-v2"])
def test_layers_that_also_read_a_constant(version, hold):
    """DeBERTa's projections read the frozen embeddings of relative positions, alone or besides the tokens."""

    def deberta():
        torch.manual_seed(0)
        shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        more = {"position_buckets": 16, "share_att_key": True, "norm_rel_ebd": "layer_norm"}
        more = more if version == "deberta-v2" else {"max_relative_positions": 16}
        more |= {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "initializer_range": 0.2}
        config = AutoConfig.for_model(version, vocab_size=64, pad_token_id=0, num_labels=3, **shape, **more)
        return AutoModelForSequenceClassification.from_config(config).requires_grad_(False).eval()

    ids = torch.randint(2, 64, (5, 12), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 2, 0, 1])}
    batches = [batch] if hold == "layer" else [{name: part[:3] for name, part in batch.items()}]
    batches += [] if hold == "layer" else [{name: part[3:] for name, part in batch.items()}]
    plain, model = deberta(), deberta()
    layers = [
        {name: m for name, m in each.deberta.named_modules() if isinstance(m, nn.Linear)} for each in (plain, model)
    ]
    assert any("pos_" in name or "key_proj" in name for name in layers[0])
    assert_same(gradients(model, layers[1], batches, hold), autograd(plain, layers[0], batches), 1e-4)


def test_gradients_of_many_examples_do_not_underflow_in_fp16():
    """The loss of one of 128 examples is divided by 128, so gradients of the mean would be below fp16's smallest."""
    batches = batches_of(examples(128, seed=5), 16, 0)
    half, wide = random_llama().half(), random_llama().half().float()
    for weight in half.model.embed_tokens.weight, wide.model.embed_tokens.weight:
        weight.data *= 30  # so that the gradients are small, as in models with large activations
    expected = autograd(wide, linear_layers(wide), batches)
    found = gradients(half, linear_layers(half), batches, "device")
    assert_same(found, expected, 0.01)


@pytest.mark.filterwarnings("ignore:.*fewer usable directions")  # 32 are asked for, layer norms leave 31
@pytest.mark.parametrize("hold", [*HOLDS, "sketch"])
def test_conv1d_weight_is_transposed(hold):
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


def test_fused_experts_are_named_not_skipped_in_silence():
    run, model = run_config(), random_mixtral()
    probe = Probe(batches_of(examples(), 2, 0), "example")
    with pytest.warns(UserWarning, match=r"not adapted: 2 tensors of fused experts .*experts\.gate_up_proj"):
        model, _ = attach_adapters(model, adaptation_for(run), build_init(run.init), probe, seed=0)
    assert {name.rpartition(".")[2] for name in adapters.lora_layers(model)} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    with pytest.raises(UsageError, match=r"gate_up_proj is one tensor for all experts.*valid: k_proj"):
        adapters.target_layers(random_mixtral(), run_config("peft.lora_target_modules=[gate_up_proj]").peft)


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("batch_size", [2, 5])
def test_unused_expert_is_named(memory, batch_size):
    model = Experts()
    layers = {f"experts.{index}": expert for index, expert in enumerate(model.experts)}
    batches = batches_of(examples(vocabulary=64), batch_size, 0)
    message = r"experts\.1 \(and 1 more\) got no gradient, .*use more examples \(init\.iters\), or remove it"
    with pytest.raises(ValueError, match=message):
        low_rank_steps(
            model, layers, batches, "example", StepSettings(singular=RANK, memory=memory), lambda n, step: None
        )
