"""Every way of holding gradients gives the steps of autograd's full-weight gradient, in the memory it promises."""

import weakref

import pytest
import torch

from lora_one.data.encode import batches_of
from lora_one.initialization import gradients as gradient_room
from lora_one.initialization import holding
from lora_one.initialization import low_rank_step as steps
from lora_one.initialization.gradients import mean_gradients
from lora_one.initialization.low_rank_step import StepSettings, low_rank_steps
from tests.helpers.examples import HOLDS, RANK, assert_same, autograd, examples, gradients, linear_layers
from tests.helpers.memory import Alive
from tests.helpers.models import random_llama, wide_llama


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("hold", HOLDS)
def test_every_place_gives_autograd_s_gradient(hold, checkpointing):
    model = random_llama()
    layers = linear_layers(model)
    batches = batches_of(examples(), 5 if hold == "layer" else 2, 0)
    expected = autograd(model, layers, batches_of(examples(), 1, 0))
    assert_same(gradients(model, layers, batches, hold, checkpointing), expected)


def test_transform_keeps_whole_gradients():
    """A transform needs the whole G, so with little memory and several batches the gradients are stored on the CPU."""
    model = random_llama()
    layers, batches = linear_layers(model), batches_of(examples(), 2, 0)
    settings = StepSettings(singular=RANK, memory="low", transform=torch.sign)
    found = {}
    assert low_rank_steps(model, layers, batches, "example", settings, found.__setitem__).memory == "cpu"
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
        assert groups == 1 or len(holding.packed(SEVEN_B, found.room)) == groups


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


def test_gradients_are_freed_after_factorisation(monkeypatch):
    """In the whole low-rank step, no other layer's G is in memory while a layer is factorised."""
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
