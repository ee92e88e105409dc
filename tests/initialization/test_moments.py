"""Second moments of inputs and output gradients against what autograd gives for one example at a time."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from lora_one.data.encode import batches_of
from lora_one.initialization import holding
from lora_one.initialization import moments as room
from lora_one.initialization.holding import room_beside
from lora_one.initialization.moments import groups_of_passes, layer_moments, sharing_inputs
from lora_one.losses import model_logits, targets
from tests.helpers.examples import autograd_gradients, examples, linear_layers
from tests.helpers.models import random_bert, random_llama, random_t5


def ours(model, batches, reduction="example", **options):
    found = {}

    def consume(name, owner, moments):
        assert owner == 0 and name not in found
        found[name] = moments

    report = layer_moments(model, linear_layers(model), batches, reduction, consume, **options)
    return found, report


def by_autograd(model, batches, loss_of):
    """C and D of every layer from its inputs and from the gradients that autograd leaves at its outputs."""
    inputs, outputs = {}, {}

    def keep(name, module, given, output):
        output.retain_grad()
        inputs.setdefault(name, []).append(given[0].detach())
        outputs.setdefault(name, []).append(output)

    layers = linear_layers(model)
    handles = [
        layer.register_forward_hook(lambda *given, name=name: keep(name, *given)) for name, layer in layers.items()
    ]
    model.get_input_embeddings().weight.requires_grad_(True)
    for batch in batches:
        loss_of(model, batch).backward()
    for handle in handles:
        handle.remove()
    model.get_input_embeddings().weight.requires_grad_(False)
    found = {}
    for name in layers:
        X = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs[name]]).double()
        E = torch.cat([y.grad.reshape(-1, y.shape[-1]) for y in outputs[name]]).double()
        found[name] = X.T @ X / len(X), E.square().mean(dim=0)
    return found


def example_loss(model, batch):
    """The mean token loss of a batch of one example, written out for each kind of model."""
    logits, wanted = model_logits(model, batch), targets(batch)
    logits = logits[:, None] if logits.dim() == 2 else logits
    return cross_entropy(logits[0], wanted[0], ignore_index=-100)


def assert_moments(found, expected, rtol=1e-4):
    for name, (C, D) in expected.items():
        assert (found[name].inputs - C).norm() <= rtol * C.norm(), name
        assert (found[name].outputs - D).norm() <= rtol * D.norm(), name


@pytest.mark.parametrize("batch_size", [1, 5])
def test_moments_are_those_of_autograd_and_padding_counts_nowhere(llama, batch_size):
    """D is the mean square of the gradients of each example's own loss, whatever the number of examples."""
    data = examples()
    found, report = ours(llama, batches_of(data, batch_size, 0))
    assert_moments(found, by_autograd(llama, batches_of(data, 1, 0), example_loss))
    for name, G in autograd_gradients(llama, data, "example").items():
        assert (found[name].gradient - G).norm() <= 1e-4 * G.norm(), name
        assert found[name].inputs.dtype == torch.float64
    assert report.examples == 5 and report.memory == "device"


def test_moments_of_inputs_of_several_blocks():
    """Only the blocks on and above the diagonal are summed; the last one is smaller."""
    model, batches = random_llama(intermediate_size=300), batches_of(examples(), 1, 0)
    assert max(layer.in_features for layer in linear_layers(model).values()) == 300
    found, _ = ours(model, batches)
    assert_moments(found, by_autograd(model, batches, example_loss))


def test_token_reduction_takes_the_gradients_of_the_sum_over_tokens(llama):
    def token_sum(model, batch):
        return cross_entropy(model_logits(model, batch)[0], targets(batch)[0], ignore_index=-100, reduction="sum")

    found, _ = ours(llama, batches_of(examples(), 2, 0), "token")
    assert_moments(found, by_autograd(llama, batches_of(examples(), 1, 0), token_sum))


def test_encoder_decoder_and_classification_head():
    """The tokens of an encoder layer are those of the prompt; of a decoder layer, those of the response."""
    bert = random_bert()
    rows = [
        {"input_ids": torch.arange(2, 6 + row)[None], "attention_mask": torch.ones(1, 4 + row).long()}
        for row in range(3)
    ]
    batches = [row | {"labels": torch.tensor([index % 2])} for index, row in enumerate(rows)]
    found, _ = ours(bert, batches)
    assert_moments(found, by_autograd(bert, batches, example_loss))
    t5 = random_t5()
    batches = [
        row | {"labels": torch.tensor([[11, 12, 13]]), "decoder_input_ids": torch.tensor([[0, 11, 12]])} for row in rows
    ]
    found, _ = ours(t5, batches)
    assert_moments(found, by_autograd(t5, batches, example_loss))


def test_layers_with_the_same_input_are_found(llama):
    groups = sharing_inputs(llama, linear_layers(llama), batches_of(examples(1), 1, 0)[0])
    names = [[name.removeprefix("model.layers.").split(".", 1)[1] for name in group] for group in groups]
    one = [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]
    assert names == [*one, *one]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_memory_mode_gives_the_same_moments_in_its_number_of_passes(llama, monkeypatch, checkpointing):
    runs = []
    original = room.backward_passes
    monkeypatch.setattr(room, "backward_passes", lambda *a, **k: runs.append(list(a[1])) or original(*a, **k))
    batches = batches_of(examples(), 2, 0)
    expected, _ = ours(llama, batches, memory="fast")
    assert len(runs) == 1
    runs.clear()
    found, _ = ours(llama, batches, memory="low", checkpointing=checkpointing)
    assert list(map(len, runs)) == [3, 1, 2, 1] * 2
    for name, moments in expected.items():
        for part in ("gradient", "inputs", "outputs"):
            torch.testing.assert_close(getattr(found[name], part), getattr(moments, part), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("local", "passes"), [(1, 1), (1000, 4)])
def test_free_memory_decides_the_number_of_passes(local, passes, monkeypatch):
    """The processes of a machine share its memory: with many of them, every group of layers has a pass of its own."""

    class Memory:
        available = 10_000_000

    runs, original = [], room.backward_passes
    monkeypatch.setattr(room, "backward_passes", lambda *a, **k: runs.append(list(a[1])) or original(*a, **k))
    monkeypatch.setattr(holding.psutil, "virtual_memory", lambda: Memory)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    ours(random_llama(num_hidden_layers=1), batches_of(examples(), 2, 0), memory="auto")
    assert len(runs) == passes


def test_groups_of_a_pass_fit_into_the_room():
    def fail():
        raise AssertionError("the room is not needed")

    def groups(activations):
        sizes = [40, 50, 60, 500, 10]
        return groups_of_passes(sizes, "auto", lambda: room_beside(sum(sizes), 200, lambda: activations))

    assert groups(0) == [[0, 1], [2], [3], [4]]
    assert groups(80) == [[0, 1], [2], [3], [4]], "90 bytes of 120 are left"
    assert groups(120) == [[0], [1], [2], [3], [4]]
    assert groups_of_passes([40, 50], "low", fail) == [[0], [1]]
    assert groups_of_passes([40, 500], "fast", fail) == [[0, 1]]


def test_bf16_model_sums_in_high_precision():
    model, data = random_llama().bfloat16(), examples(16)
    found, _ = ours(model, batches_of(data, 1, 0))
    expected, _ = ours(random_llama(), batches_of(data, 1, 0))
    for name, moments in found.items():
        assert moments.inputs.dtype == torch.float64 and moments.gradient.dtype == torch.float64
        assert (moments.inputs - expected[name].inputs).norm() <= 0.03 * expected[name].inputs.norm(), name


def test_gradient_lies_in_the_span_of_few_inputs_to_fp64():
    """C^-1 would multiply what lies outside, which is rounding, by 1 / damping."""
    model, batches = random_llama(hidden_size=64, intermediate_size=96), batches_of(examples(1), 1, 0)
    found, _ = ours(model, batches)
    for name, moments in found.items():
        values, vectors = torch.linalg.eigh(moments.inputs)
        outside = vectors[:, values <= 1e-10 * values[-1]]
        assert outside.shape[1] > 0, "fewer tokens than inputs"
        assert (moments.gradient.double() @ outside).norm() <= 1e-10 * moments.gradient.norm(), name


def test_unused_layer_is_named(llama):
    layers = linear_layers(llama) | {"spare": torch.nn.Linear(4, 4)}
    with pytest.raises(ValueError, match="layer spare got no gradient"):
        layer_moments(llama, layers, batches_of(examples(), 2, 0), "example", lambda *_: None)
