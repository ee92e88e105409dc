"""Merging and saving."""

import copy
import filecmp
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from lora_one.adaptation import layers as adapters
from lora_one.adaptation.checkpoints import load_adapter, merge_adapter, restore_adapter, save_adapter, save_merged
from lora_one.adaptation.wrapping import wrap
from lora_one.errors import RunError, UsageError
from lora_one.files import whole_folder
from lora_one.models import load_model
from lora_one.runs import saving
from tests.helpers.models import folder_of, random_llama, random_mixtral
from tests.helpers.runs import finish, run_config, small_run

IDS = torch.arange(3, 40).reshape(1, -1)


def adapted(dtype=torch.float32, **changes):
    """A random model with random factors of both sides, as after some training."""
    run = run_config("init=default", "init.lora_B=zeros")
    model = wrap(random_llama(**changes).to(dtype), run.peft, "fp32")
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return model.eval()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@torch.no_grad()
def test_merged_logits_are_the_adapted_ones(dtype, bound):
    model = adapted(dtype)
    if dtype == torch.float64:
        model = model.double()
    expected = model(IDS).logits
    merged = merge_adapter(model)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert (merged(IDS).logits - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
@torch.no_grad()
def test_merging_an_adapter_of_the_output_layer_leaves_the_tied_embeddings_as_they_are(tokenizer, tmp_path):
    """An adapter from elsewhere may have one; the saved model has two weights then."""
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = get_peft_model(random_llama(len(tokenizer), tie_word_embeddings=True), config).eval()
    words = model.get_input_embeddings().weight.clone()
    expected = model(IDS).logits
    merged = merge_adapter(model)
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(merged.model.embed_tokens.weight, words) and not torch.equal(merged.lm_head.weight, words)
    save_merged(merged, tokenizer, tmp_path / "merged")
    again = load_model(str(tmp_path / "merged"), dtype="fp32")
    torch.testing.assert_close(again(IDS).logits, expected, rtol=1e-4, atol=1e-4)


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
    model = adapted(torch.bfloat16)
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


def test_adapter_of_another_model_is_refused(tmp_path):
    save_adapter(adapted(), tmp_path / "adapter")
    with pytest.raises(UsageError, match="does not fit this model"):
        load_adapter(random_llama(intermediate_size=64), tmp_path / "adapter")
    for layers, reason in ((1, "14 of its tensors are not in the model"), (3, "14 tensors of the model")):
        with pytest.raises(UsageError, match=f"does not fit this model .*{reason}"):
            load_adapter(random_llama(num_hidden_layers=layers), tmp_path / "adapter")
    with pytest.raises(UsageError, match=r"contains no adapter_config\.json"):
        load_adapter(random_llama(), tmp_path)


def test_resume_point_is_restored_in_place_and_in_its_own_dtype(tmp_path):
    """The parameters that the optimizer knows get the values; PEFT's own way would leave fp32 copies instead."""
    peft = run_config("init=default").peft
    model, other = (wrap(random_llama(), peft, "bf16") for _ in range(2))
    before = {name: parameter for name, parameter in other.named_parameters() if "lora_" in name}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(tmp_path)
    restore_adapter(other, tmp_path)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            assert other.get_parameter(name) is before[name] and before[name].dtype == torch.bfloat16
            assert torch.equal(before[name], parameter)


def test_resume_point_of_another_adapter_is_refused(tmp_path):
    adapted().save_pretrained(tmp_path)
    core = wrap(random_llama(), run_config("init=lora_xs").peft, "fp32")
    with pytest.raises(RunError, match="an adapter with other layers than this run: remove it, or add overwrite=true"):
        restore_adapter(core, tmp_path)


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    place = tmp_path / "adapter"
    with whole_folder(place) as folder:
        (folder / "old").touch()
    with pytest.raises(ZeroDivisionError), whole_folder(place) as folder:
        (folder / "new").touch()
        raise ZeroDivisionError
    assert [file.name for file in place.iterdir()] == ["old"]
    with pytest.raises(RunError, match=r"cannot be written \(No space left"), whole_folder(place):
        raise OSError(28, "No space left on device")
    assert [file.name for file in tmp_path.iterdir()] == ["adapter"], "nothing is left lying about"
