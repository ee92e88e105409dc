"""What is saved of layers that PEFT treats differently: output layers, trained biases, weights with two users."""

import copy
import pickle

import pytest
import torch
from peft import PeftModel

from lora_one import AdapterFactors, initialize_adapters, save_adapter
from lora_one.adaptation import layers as adapters
from lora_one.data.encode import batches_of
from lora_one.errors import UsageError
from tests.helpers.examples import examples
from tests.helpers.library import NEEDED, assert_close, logits, lora, move
from tests.helpers.models import random_llama


def test_saving_twice_replaces_the_adapter_and_keeps_other_files(tmp_path):
    model = initialize_adapters(random_llama(), lora(), method="pissa")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "checkpoint-1").mkdir()
    for step in range(2):
        move(model)
        save_adapter(model, tmp_path, results={"step": step})
        assert_close(logits(PeftModel.from_pretrained(random_llama(), tmp_path)), logits(model))
        assert f"| step | {step} |" in (tmp_path / "README.md").read_text()
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors", "checkpoint-1", "notes.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.parametrize("method", ["lora_one", "pissa"])
@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_a_copy_of_a_model_is_saved_as_the_model(how, method, tmp_path):
    """The copy's own values."""
    model = initialize_adapters(random_llama(), lora(), batches_of(examples(), 2, 0), method=method, examples=None)
    copied = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    move(copied)
    save_adapter(copied, tmp_path)
    assert_close(logits(PeftModel.from_pretrained(random_llama(), tmp_path)), logits(copied))
    copied.load_adapter(tmp_path, "other")
    assert "other" in copied.peft_config and "other" not in model.peft_config


def test_a_readme_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(UsageError, match=r"contains README.md, .* but no adapter_config.json.*: choose another folder"):
        save_adapter(initialize_adapters(random_llama(), lora(), method="lora"), tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("path", [".", "~/adapter", "link", "a/../b"])
def test_every_spelling_of_a_folder_is_understood(path, tmp_path, monkeypatch):
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to("target")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    save_adapter(initialize_adapters(random_llama(), lora(), method="lora"), path)
    place = {".": ".", "~/adapter": "home/adapter", "link": "target", "a/../b": "b"}[path]
    assert (tmp_path / place / "adapter_config.json").exists()
    assert not (tmp_path / "~").exists() and (tmp_path / "link").is_symlink()


HEAD = {"target_modules": ["q_proj", "lm_head"]}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("method", ["pissa", "lora_ga", "olora", "lora_one", "lora_sb"])
def test_an_adapted_output_layer_is_saved_for_the_original_base(method, tmp_path):
    """PEFT also saves the base weight of this layer, which is W - s B0 A0 for some methods."""
    batches = batches_of(examples(), 2, 0)
    settings = {"method": method, "examples": None, **NEEDED.get(method, {})}
    model = initialize_adapters(random_llama(), lora(**HEAD), batches, **settings)
    move(model)
    trained = logits(model)
    save_adapter(model, tmp_path / "adapter")
    assert_close(logits(PeftModel.from_pretrained(random_llama(), tmp_path / "adapter")), trained)


@pytest.mark.filterwarnings("ignore:.*lora_bias=True", "ignore:Adapter 'default'.*invalid shape")  # of PEFT, for a bias
@pytest.mark.parametrize("method", ["pissa", "lora_ga", "svd", "lora_one"])
def test_a_trained_bias_of_b_is_saved(method, tmp_path):
    batches = batches_of(examples(), 2, 0)
    model = initialize_adapters(random_llama(), lora(lora_bias=True), batches, method=method, examples=None)
    move(model)
    assert all(layer.lora_B["default"].bias.any() for layer in adapters.lora_layers(model).values())
    trained = logits(model)
    save_adapter(model, tmp_path / "adapter")
    assert_close(logits(PeftModel.from_pretrained(random_llama(), tmp_path / "adapter")), trained)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_a_trained_bias_of_the_base_is_saved(bias, tmp_path):
    base = random_llama(attention_bias=True)
    model = initialize_adapters(base, lora(bias=bias), method="pissa")
    move(model)
    with torch.no_grad():
        model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.bias += 0.5
    trained = logits(model)
    save_adapter(model, tmp_path / "adapter")
    assert_close(logits(PeftModel.from_pretrained(random_llama(attention_bias=True), tmp_path / "adapter")), trained)


def shifting(layer, step):
    m, n = layer.shape
    return AdapterFactors(torch.ones(m, layer.rank), torch.full((layer.rank, n), 1e-3), shift_base=True)


SHARED = [
    ({"tie_word_embeddings": True}, HEAD, r"the weight of lm_head is also used by model\.embed_tokens"),
    (
        {},
        {"layer_replication": [[0, 2], [0, 1]]},
        r"the weight of model\.layers\.0\..* is also used by model\.layers\.2",
    ),
]


@pytest.mark.parametrize(("changes", "config", "message"), SHARED, ids=["tied", "replicated"])
@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.")
@pytest.mark.parametrize("method", ["pissa", "svd", "lora_ga", shifting])
def test_a_weight_with_two_users_is_not_changed(method, changes, config, message):
    base = random_llama(**changes)
    weight = base.model.layers[0].self_attn.q_proj.weight.clone()
    with pytest.raises(UsageError, match=message):
        initialize_adapters(base, lora(**config), batches_of(examples(), 2, 0), method=method, examples=None)
    assert torch.equal(base.model.layers[0].self_attn.q_proj.weight, weight)
    assert logits(base).isfinite().all()


@pytest.mark.filterwarnings("ignore:Model has .tie_word", "ignore:Setting `save_embedding_layers`")
def test_a_tied_output_layer_can_be_adapted_if_the_base_is_not_changed(tmp_path):
    base = random_llama(tie_word_embeddings=True)
    model = initialize_adapters(base, lora(**HEAD), batches_of(examples(), 2, 0), examples=None)
    move(model)
    trained = logits(model)
    save_adapter(model, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(random_llama(tie_word_embeddings=True), tmp_path / "adapter")
    assert_close(logits(loaded), trained)


def test_a_block_that_is_used_twice_can_be_changed():
    """Both uses have the adapter."""
    base = random_llama()
    base.model.layers[1] = base.model.layers[0]
    original = logits(base)
    assert_close(logits(initialize_adapters(base, lora(), method="pissa")), original)


def test_a_layer_that_another_block_uses_without_the_adapter_is_not_changed():
    base = random_llama()
    base.model.layers[1].self_attn.q_proj = base.model.layers[0].self_attn.q_proj
    with pytest.raises(UsageError, match=r"q_proj is also used by model\.layers\.1\.self_attn"):
        initialize_adapters(base, lora(), method="pissa")
