"""Merging, and the folders of merged models."""

import copy
import filecmp
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import BartConfig, BartForConditionalGeneration

from lora_one.adaptation import layers as adapters
from lora_one.adaptation.checkpoints import load_adapter
from lora_one.adaptation.merging import merge_adapter, save_merged
from lora_one.models import load_model
from lora_one.runs import saving
from tests.helpers.models import folder_of, random_llama, random_mixtral
from tests.helpers.runs import finish, small_run
from tests.helpers.training import adapted_llama

IDS = torch.arange(3, 40).reshape(1, -1)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@torch.no_grad()
def test_merged_logits_are_the_adapted_ones(dtype, bound):
    model = adapted_llama(dtype)
    if dtype == torch.float64:
        model = model.double()
    expected = model(IDS).logits
    merged = merge_adapter(model)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert (merged(IDS).logits - expected).abs().max() <= bound * expected.abs().max()


def tied_llama(vocabulary):
    return random_llama(vocabulary, tie_word_embeddings=True), {"input_ids": IDS}, "CausalLM"


def tied_bart(vocabulary):
    """Its encoder's, its decoder's and its output weights are one."""
    torch.manual_seed(0)
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    config = BartConfig(
        vocab_size=vocabulary, d_model=32, encoder_attention_heads=4, decoder_attention_heads=4, **layers
    )
    given = {"input_ids": IDS, "decoder_input_ids": IDS}
    return BartForConditionalGeneration(config).eval(), given, "ConditionalGeneration"


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings", "ignore:.*ensure_weight_tying")
@pytest.mark.parametrize("made", [tied_llama, tied_bart])
@pytest.mark.parametrize(
    "targets", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"], ["embed_tokens", "ensure_weight_tying"]]
)
@torch.no_grad()
def test_merging_an_adapter_on_one_of_several_tied_weights_leaves_the_others(made, targets, tokenizer, tmp_path):
    """An adapter from elsewhere may have one; the saved model has several weights then."""
    base, given, kind = made(len(tokenizer))
    tying = {"ensure_weight_tying": True} if "ensure_weight_tying" in targets else {}
    config = LoraConfig(r=2, target_modules=["q_proj", *(t for t in targets if "_tying" not in t)], **tying)
    model = get_peft_model(base, config).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.2
    with model.disable_adapter():
        plain = model(**given).logits
    expected = model(**given).logits
    assert (expected - plain).abs().max() > 0.1
    merged = merge_adapter(model)
    torch.testing.assert_close(merged(**given).logits, expected, rtol=1e-4, atol=1e-3)
    save_merged(merged, tokenizer, tmp_path / "merged")
    again = load_model(str(tmp_path / "merged"), dtype="fp32", model_type=kind)
    torch.testing.assert_close(again(**given).logits, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.filterwarnings("ignore:.*target_parameters")
@torch.no_grad()
def test_layers_of_an_adapter_from_elsewhere_that_are_not_linear_are_merged_too():
    targets = {
        "target_modules": ["q_proj", "embed_tokens"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    }
    model = get_peft_model(random_mixtral(), LoraConfig(r=2, init_lora_weights=False, **targets)).eval()
    with model.disable_adapter():
        plain = model(IDS).logits
    expected = model(IDS).logits
    merged = merge_adapter(model)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert (merged(IDS).logits - expected).abs().max() <= 1e-4 * (expected - plain).abs().max()


def test_merge_is_the_formula_rounded_once():
    """bf16: round(W + s B A), not round(W + round(s B A))."""
    model = adapted_llama(torch.bfloat16)
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    W, A, B = layer.base_layer.weight.float(), layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = (W + 16 / 8**0.5 * B @ A).bfloat16()
    twice = W.bfloat16() + (16 / 8**0.5 * B @ A).bfloat16()
    merged = merge_adapter(model).model.layers[1].mlp.down_proj.weight
    assert torch.equal(merged, expected) and not torch.equal(twice, expected)


@pytest.mark.parametrize(
    "start",
    [
        "init=gradient",
        "init=gradient init.direction=LoRA-GA",
        "init=svd init.dtype=bf16",
        "init=pissa",
        "init=svd peft=dora",
        "init=gradient init.direction=LoRA-GA peft=all_w_emb",
        "init=gradient init.direction=LoRA-SB peft=all_w_emb",
    ],
)
def test_a_run_and_a_later_merge_write_the_same_bytes_from_the_original_16_bit_base(start, tokenizer, tmp_path):
    """round(W + s B A) with the factors of adapter/, which hold [B, -B0] and [A; A0] where the base was shifted."""
    base = folder_of(random_llama(len(tokenizer), tie_word_embeddings=True), tokenizer, tmp_path / "base")
    fast = ("model.saving=true", "model.epochs=0.5")
    folder = finish(small_run(tmp_path, base, *start.split(), "model.bf16=true", *fast))
    merged = load_file(folder.merged / "model.safetensors")
    first = folder.merged.rename(tmp_path / "first")
    saving.merge_run(folder)
    same, *different = filecmp.cmpfiles(first, folder.merged, [file.name for file in first.iterdir()], shallow=False)
    assert "model.safetensors" in same and different == [[], []]
    model = load_adapter(load_model(str(base), dtype="bf16"), folder.adapter)
    for name, layer in adapters.lora_layers(model).items():
        B, A = (getattr(layer, f"lora_{letter}")["default"].weight for letter in "BA")
        W = layer.get_base_layer().weight
        exact = W.float() + layer.scaling["default"] * (B.float() @ A.float())
        if "dora" in start:  # magnitudes times the directions of the rows
            exact = layer.lora_magnitude_vector["default"].weight[:, None] * exact / exact.norm(dim=1, keepdim=True)
            torch.testing.assert_close(merged[f"{name}.weight"], exact.bfloat16(), rtol=2**-7, atol=0)
        else:
            assert torch.equal(merged[f"{name}.weight"], exact.bfloat16()), name
        assert not torch.equal(merged[f"{name}.weight"], W), name


def test_a_saved_tokenizer_cuts_and_pads_nothing(tokenizer, tmp_path):
    """Programs without transformers read that from its file and would cut every text."""
    own = copy.deepcopy(tokenizer)
    own(["a long text " * 20], truncation=True, max_length=8, padding="max_length")
    save_merged(random_llama(), own, tmp_path / "merged")
    written = json.loads((tmp_path / "merged/tokenizer.json").read_text())
    assert written["truncation"] is written["padding"] is None
