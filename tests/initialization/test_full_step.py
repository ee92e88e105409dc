"""One step with the full gradient: W - eta G with the gradient of plain autograd, and a searched eta."""

import copy
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_one.data.encode import batches_of
from lora_one.errors import UsageError
from lora_one.initialization.full_step import full_step
from lora_one.initialization.solution import Probe
from lora_one.losses import mean_loss
from lora_one.records.folder import RunFolder, method_name
from lora_one.runs import initial_model
from tests.helpers.examples import autograd_gradients, examples, linear_layers
from tests.helpers.models import random_gpt2, random_llama
from tests.helpers.runs import finish, run_config, small_run


def probe_of(data, reduction="example", others=None):
    """The examples of the gradient in batches of two, and those of the search."""
    return Probe(batches_of(data, 2, 0), reduction, search=others and batches_of(others, 2, 0))


def weights_of(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("reduction", ["example", "token"])
def test_every_target_becomes_w_minus_eta_g(reduction):
    """With the gradient that autograd finds, one example at a time; nothing else changes."""
    model, data, eta = random_llama(), examples(), 0.37
    before, layers = weights_of(model), linear_layers(model)
    gradients = autograd_gradients(copy.deepcopy(model), data, reduction)
    start = full_step(model, layers, probe_of(data, reduction), eta)
    assert len(gradients) == len(layers) == 14
    for name, value in weights_of(model).items():
        G = gradients.get(name.removesuffix(".weight"))
        expected = before[name] if G is None else before[name] - eta * G
        torch.testing.assert_close(value, expected, rtol=0 if G is None else 1e-6, atol=0 if G is None else 1e-7)
    for name, G in gradients.items():
        shift = float(eta * G.norm() / before[f"{name}.weight"].norm())
        assert start.relative_shift[name] == pytest.approx(shift, rel=1e-5)
    slope = sum(float(G.square().sum()) for G in gradients.values())
    assert start.solution.predicted_decrease == pytest.approx(eta * slope, rel=1e-5)
    assert start.solution.gamma == pytest.approx(1 / eta) and not start.solution.searched


def test_layers_that_store_the_transposed_weight():
    model, data, eta = random_gpt2(), examples(3), 0.2
    name = "transformer.h.0.attn.c_attn"
    layer = model.get_submodule(name)
    free = copy.deepcopy(model).requires_grad_(True)
    losses = [
        free(torch.tensor([e.input_ids]), labels=torch.tensor([e.labels])).loss for e in data
    ]  # mean over the answer tokens of one example
    (sum(losses) / len(losses)).backward()
    before = layer.weight.detach().clone()
    full_step(model, {name: layer}, probe_of(data), eta)
    torch.testing.assert_close(layer.weight, before - eta * free.get_submodule(name).weight.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_searched_eta_lowers_the_loss_it_was_searched_on(elsewhere):
    model, data, others = random_llama(), examples(), examples()[1:] if elsewhere else None
    measured = batches_of(others or data, 1, 0)
    gradients = autograd_gradients(copy.deepcopy(model), data, "example")
    before, loss = weights_of(model), mean_loss(model, measured, "example")
    found = full_step(model, linear_layers(model), probe_of(data, others=others), None).solution
    eta = 1 / found.gamma
    for name, G in gradients.items():
        torch.testing.assert_close(
            model.get_submodule(name).weight, before[f"{name}.weight"] - eta * G, rtol=1e-5, atol=1e-6
        )
    after = mean_loss(model, measured, "example")
    assert after <= loss and after == pytest.approx(min(found.searched.values()), rel=1e-5)
    assert found.searched_on == (4 if elsewhere else 0) and (found.loss is None) == elsewhere
    assert len(found.searched) > 1 and all(map(math.isfinite, found.searched.values()))


def test_a_run_saves_the_step_as_a_model(tmp_path, llama_folder, monkeypatch):
    """Without training, from the command line to merged_checkpoint/, whose weights are W - eta G."""
    probes = []
    original = initial_model.full_step

    def remember(base, layers, probe, eta):
        probes.append((copy.deepcopy(base), probe))
        return original(base, layers, probe, eta)

    monkeypatch.setattr(initial_model, "full_step", remember)
    overrides = ["peft=full_ft", "init=full_step", "model.epochs=0", "init.search_examples=0", "init.bsz=2"]
    folder = finish(small_run(tmp_path, llama_folder, *overrides))
    ((base, probe),) = probes
    record = json.loads(folder.run_json.read_text())["init"]
    assert record["method"] == "full gradient step" and record["examples"] == 16
    assert record["loss_after"] <= record["loss_before"] and record["eta"] == 1 / record["searched"]["gamma"]
    base.requires_grad_(True)
    losses = [base(**row).loss for batch in probe.batches for row in rows_of(batch)]
    (sum(losses) / len(losses)).backward()
    saved = AutoModelForCausalLM.from_pretrained(folder.merged, dtype=torch.float32)
    targets = {f"{name}.weight" for name in linear_layers(base)}
    for (name, value), (_, old) in zip(saved.named_parameters(), base.named_parameters(), strict=True):
        expected = old - record["eta"] * old.grad if name in targets else old
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)
    assert RunFolder(folder.path).trained == folder.merged


def rows_of(batch):
    """The examples of a batch, each without its padding."""
    for index, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        yield {name: value[index : index + 1, :length] for name, value in batch.items()}


def test_names_of_folders():
    names = [method_name(run_config("peft=full_ft", "init=full_step", *more)) for more in ([], ["init.eta=0.5"])]
    assert [name.rpartition("-lr")[0] for name in names] == ["full-step-search", "full-step-eta0.5"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["init=full_step"], "initialises no adapters.*add peft=full_ft"),
        (["init=full_step", "peft=adalora"], "initialises no adapters.*add peft=full_ft"),
        (["peft=full_ft", "init=full_step", "init.cache=x"], "init.cache=x stores factors of adapters"),
        (["peft=full_ft", "init=full_step", "init.eta=1", "init.search_examples=4"], "only if eta is searched for"),
        (["peft=full_ft", "init=full_step", "init.eta=0"], "init.eta=0"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides, message):
    with pytest.raises(UsageError, match=message):
        run_config(*overrides)


def test_a_weight_of_two_layers_is_refused():
    model = random_llama()
    one, two = (model.model.layers[place].self_attn for place in (0, 1))
    two.q_proj.weight = one.q_proj.weight
    with pytest.raises(UsageError, match="two of the target layers have the same weight"):
        full_step(model, {"a": one.q_proj, "b": two.q_proj}, probe_of(examples()), 0.1)
