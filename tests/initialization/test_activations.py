"""What a pass keeps, measured, against a forecast without data; and the room that it leaves for the gradients."""

import pytest
import torch

from lora_one.data.encode import batches_of
from lora_one.initialization import holding
from lora_one.initialization.activations import activations_of
from lora_one.initialization.low_rank_step import StepSettings, low_rank_steps
from lora_one.runs.memory_forecast import activation_bytes
from tests.helpers.examples import RANK, assert_same, examples, linear_layers
from tests.helpers.models import wide_llama


def measured(rows, *, checkpointing=False):
    model = wide_llama()
    batches = [*batches_of(examples(2), 1, 0), *batches_of(examples(5), rows, 0)]
    largest = max(batches, key=lambda batch: batch["input_ids"].numel())["input_ids"]
    layers = linear_layers(model)
    found = activations_of(model, layers, batches, "example", checkpointing=checkpointing)
    shape = (*largest.shape, torch.float32)
    logits = 4 * largest.numel() * model.config.vocab_size
    return found, activation_bytes(model.config, "CausalLM", list(layers), *shape, checkpointing=False), logits


@pytest.mark.parametrize("rows", [1, 5])
def test_the_largest_batch_keeps_what_is_forecast_without_its_data(rows):
    found, forecast, logits = measured(rows)
    assert 0.95 * forecast <= found <= 1.05 * forecast + 2 * logits, (found, forecast, logits)


def test_checkpointing_keeps_less():
    assert measured(5, checkpointing=True)[0] < 0.5 * measured(5)[0]


@pytest.mark.parametrize(
    ("wanted", "free", "activations", "room"),
    [
        (10, 100, None, 50),  # small gradients: the activations are not measured
        (60, 100, 0, 50),
        (60, 100, 20, 50),
        (60, 100, 60, 30),  # three quarters of what is left
        (60, 100, 100, 0),
        (60, 100, 300, 0),
    ],
)
def test_gradients_and_activations_fit_together(wanted, free, activations, room):
    assert holding.room_beside(wanted, free, lambda: activations) == room


@pytest.mark.parametrize(("beside", "place"), [(1.5, "device"), (0.02, "sketch")])
def test_little_memory_beside_the_activations_means_a_sketch_of_the_same_steps(beside, place, monkeypatch):
    """beside: bytes of free memory beside the activations, in bytes of all gradients."""
    model = wide_llama()
    layers, batches, settings = linear_layers(model), batches_of(examples(12), 4, 0), StepSettings(singular=RANK)
    sums = sum(map(holding.gradient_bytes, layers.values()))
    kept = activations_of(model, layers, batches, "example", checkpointing=False)

    assert 3 * sums < kept < 7 * sums, "so that half of the free memory alone would be enough for all gradients"

    class Host:
        available = int(kept + beside * sums)

    whole, found = {}, {}
    low_rank_steps(model, layers, batches, "example", settings, whole.__setitem__)
    monkeypatch.setattr(holding.psutil, "virtual_memory", lambda: Host)
    assert low_rank_steps(model, layers, batches, "example", settings, found.__setitem__).memory == place
    assert_same({n: s.U * s.S @ s.Vh for n, s in found.items()}, {n: s.U * s.S @ s.Vh for n, s in whole.items()})
