"""The planned initialisation takes the way that the code takes, and fits where its memory says so."""

from dataclasses import replace

import pytest
import torch

from lora_one.adaptation.layers import target_layers
from lora_one.config.hardware import read_hardware
from lora_one.initialization import holding
from lora_one.initialization.holding import how_to_hold
from lora_one.runs.memory_forecast import groups_of_inputs
from lora_one.runs.planned_run import PlannedRun
from lora_one.runs.planned_start import holding_of, planned_start
from tests.helpers.models import random_llama
from tests.helpers.runs import adaptation_for, run_config


def planned_for(*overrides, memory=None, kept=100_000):
    """A run of a small model, with 100 kB kept for each token; memory: that a plan may use on one device."""
    skeleton = random_llama(hidden_size=96, intermediate_size=160)
    run = run_config("model.bf16=false", "model.max_length=64", "dataset.accuracy_examples=0", *overrides)
    hardware = read_hardware("h100")
    hardware = hardware if memory is None else replace(hardware, memory=memory / 0.9)
    layers, trainable = target_layers(skeleton, run.peft), adaptation_for(run).trainable_parameters(skeleton)
    return PlannedRun(run, skeleton, layers, trainable, 1000, lambda length, _: kept * length, hardware)


@pytest.mark.parametrize("memory", ["fast", "low", "auto"])
@pytest.mark.parametrize("iters", [1, 8])
@pytest.mark.parametrize("init", ["lora_one", "gora"])
def test_gradients_are_stored_where_the_code_stores_them(init, iters, memory, monkeypatch):
    planned = planned_for(f"init={init}", f"init.memory={memory}", f"init.iters={iters}")
    ids = torch.zeros(1, 64, dtype=torch.long)

    class Host:
        available = int(planned.free(1))

    monkeypatch.setattr(holding.psutil, "virtual_memory", lambda: Host)
    whole = planned.run.init.sets_ranks
    batches = [{"input_ids": ids}] * iters
    expected = how_to_hold(planned.layers, batches, memory, whole=whole, activations=lambda: 0)
    assert holding_of(planned, 1, memory, iters, 64 * iters, 0.0).place == expected.place
    assert planned_start(planned, 1, memory, ()).place == expected.place


def test_little_memory_means_groups_of_layers_with_a_pass_each():
    fast = planned_for("init=gora", "init.iters=8", kept=30_000)
    sums = 4 * sum(m * n for m, n in fast.shapes)
    memory = fast.base + fast.example(64) + 0.8 * sums  # of what the activations leave, three quarters
    planned = planned_for("init=gora", "init.iters=8", memory=memory, kept=30_000)
    one, two = (planned_start(planned, 1, memory, ()) for memory in ("fast", "auto"))
    assert (one.place, one.passes, two.place, two.passes) == ("device", 1, "device", 2)
    assert two.memory < one.memory and two.seconds > one.seconds


def test_without_hardware_the_choice_of_auto_is_not_known():
    planned = replace(planned_for("init=lora_one"), hardware=None)
    assert planned_start(planned, 4, "auto", ()) is None
    assert planned_start(planned, 4, "low", ()).seconds is None


def test_every_process_takes_its_share_of_the_batches():
    planned = planned_for("init=lora_one", "init.iters=64", "init.scale=stable", "model.sharded=true")
    sent = {count: planned_start(planned, count, "fast", ()).sent for count in (4, 16, 64)}
    for count, found in sent.items():
        assert found.gathered == planned.base * (2 * 64 / count + 1), "and one pass for the loss of the start"
        assert found.reduced == 8 * sum(m * n for m, n in planned.shapes), "fp64 sums of a small model"


def test_one_batch_sends_the_factors_alone():
    sent = planned_start(planned_for("init=lora_one", "init.iters=1"), 8, "auto", ()).sent
    assert sent.reduced == sent.all_reduced == sent.gathered == 0 < sent.broadcast


def test_one_batch_for_each_process_needs_either_activations_or_sums():
    planned = planned_for("init=lora_one", "init.iters=8")
    one, eight = (planned_start(planned, count, "fast", ()).memory for count in (1, 8))
    sums = 8 * sum(m * n for m, n in planned.shapes)
    assert one - eight == min(sums, planned.example(64))


@pytest.mark.parametrize(("memory", "passes"), [("fast", 1), ("low", 8)])
def test_second_moments_of_one_input_or_of_all(memory, passes):
    planned = planned_for("init=lora_da")
    groups = groups_of_inputs(planned.skeleton.config, "CausalLM", planned.layers)
    start = planned_start(planned, 4, memory, groups)
    assert start.passes == passes == (1 if memory == "fast" else len(groups))


@pytest.mark.parametrize("init", ["eva", "lora_ga_peft"])
def test_what_peft_computes_is_not_shared_by_the_processes(init):
    one, eight = (planned_start(planned_for(f"init={init}"), count, None, ()) for count in (1, 8))
    assert eight.sent.sent(8) == 0 and eight.seconds > one.seconds / 2, "only the loss of the start is shared"
