"""Training as it is planned: against what was measured on an H100, and how it depends on the number of processes."""

import json

import pytest
import torch

from lora_one.adaptation.layers import target_layers
from lora_one.config.hardware import read_hardware
from lora_one.models import load_skeleton
from lora_one.runs.memory_forecast import activation_bytes
from lora_one.runs.planned_run import PlannedRun
from tests.helpers.llama_shapes import write_config
from tests.helpers.models import random_llama
from tests.helpers.paths import ROOT
from tests.helpers.runs import adaptation_for, run_config


def planned_for(skeleton, *overrides, kept=None, hardware="h100"):
    run = run_config("init=lora_one", "dataset.accuracy_examples=0", *overrides)
    layers = target_layers(skeleton, run.peft) if run.peft.use_peft else {}
    trainable = adaptation_for(run).trainable_parameters(skeleton)
    kept = kept or (lambda length, dtype: 1000 * length * dtype.itemsize)
    return PlannedRun(run, skeleton, layers, trainable, 1000, kept, read_hardware(hardware))


@pytest.fixture(scope="module")
def llama_7b(tmp_path_factory):
    """The run that docs/gpu/train.json measured: one example of 1,024 tokens at a time, four for each step."""
    skeleton = load_skeleton(str(write_config(tmp_path_factory.mktemp("models"), "7B")))

    def kept(length, dtype):
        names = [name for name, part in skeleton.named_modules() if isinstance(part, torch.nn.Linear)]
        return activation_bytes(skeleton.config, "CausalLM", [n for n in names if n != "lm_head"], 1, length, dtype)

    sizes = ["model.max_length=1024", "model.real_batch_size=4", "model.per_device_batch_size=1", "model.bf16=true"]
    return planned_for(skeleton, *sizes, kept=kept)


def recorded(part, name):
    rows = json.loads((ROOT / f"docs/gpu/{part}.json").read_text())["rows"]
    return next(row for row in rows if row["name"] == name)


def test_memory_is_what_an_h100_measured(llama_7b):
    """In training, and in the passes of an initialisation, which have neither adapters nor an optimizer."""
    training = recorded("train", "ours, 1 at a time")["peak_gib"] * 2**30
    assert llama_7b.training_memory(1) == pytest.approx(training, rel=0.02)
    passes = recorded("init", "passes, 8 batches of 1")["peak_gib"] * 2**30
    assert llama_7b.base + llama_7b.example(1024) == pytest.approx(passes, rel=0.02)


def test_the_efficiency_of_the_profile_is_what_an_h100_reached(llama_7b):
    assert llama_7b.step_seconds(1) == pytest.approx(recorded("train", "ours, 1 at a time")["seconds"], rel=0.03)
    flops = 8 * 1024 * 4 * llama_7b.weights
    passes = llama_7b.pass_seconds(flops, 2, 2, 1, llama_7b.hardware.initialisation_efficiency)
    assert passes == pytest.approx(recorded("init", "passes, 8 batches of 1")["seconds"], rel=0.03)


def test_a_whole_base_is_the_same_on_every_process_and_a_sharded_one_is_divided():
    batch = ["model.real_batch_size=64", "model.per_device_batch_size=1"]
    whole, sharded = (planned_for(random_llama(), *batch, f"model.sharded={value}") for value in (False, True))
    assert whole.training_memory(8) == whole.training_memory(64)
    assert whole.training_memory(8) - whole.training_memory(1) >= 4 * whole.trainable, "buffers of DDP"
    assert sharded.training_memory(8) - sharded.training_memory(64) == pytest.approx(whole.base * (1 / 8 - 1 / 64))
    assert sharded.step_traffic(8).gathered == 2 * 8 * whole.base and whole.step_traffic(8).gathered == 0
    assert whole.begin_traffic().broadcast == 4 * whole.trainable
    assert sharded.begin_traffic().broadcast == 4 * whole.trainable


def test_a_replicated_base_is_divided_and_gathered_within_its_copy():
    """On 64 devices, 8 of a node: each stores an eighth, and gathers it by the links of the node."""
    batch = ["model.real_batch_size=64", "model.per_device_batch_size=1"]
    all_of_them, within, across = (planned_for(random_llama(), *batch, f"model.sharded={n}") for n in ("true", 8, 16))
    assert within.resident(64) == all_of_them.resident(8) and across.resident(64) == all_of_them.resident(16)
    adapters = 2 * 4 * within.trainable * 63 / 64
    assert within.sent(within.step_traffic(64), 64) == pytest.approx(adapters + 2 * within.base * 7 / 8)
    links = within.hardware.link_within_node, within.hardware.link_between_nodes
    assert within.pass_seconds(0, 0, 2, 64, 0.5) == pytest.approx(2 * within.base * 7 / 8 / links[0])
    assert across.pass_seconds(0, 0, 2, 64, 0.5) == pytest.approx(2 * within.base * 15 / 16 / links[1])
    astride = planned_for(random_llama(), *batch, "model.sharded=3")  # ranks 6, 7 and 8
    assert astride.pass_seconds(0, 0, 2, 63, 0.5) == pytest.approx(2 * within.base * 2 / 3 / links[1])


def test_processes_share_the_micro_batches_of_a_step_and_then_add_up_the_gradients():
    planned = planned_for(random_llama(), "model.real_batch_size=64", "model.per_device_batch_size=8")
    assert planned.step_traffic(1).sent(1) == 0
    tokens = 8 * planned.run.model.max_length
    alone = 8 * planned.pass_seconds(tokens * (4 * planned.weights + 6 * planned.trainable), 2, 2, 1, 0.11)
    assert planned.step_seconds(1) == pytest.approx(alone)
    assert planned.step_seconds(8) == pytest.approx(alone / 8 + planned.step_traffic(8).sent(8) / 450e9)


def test_a_pass_takes_as_long_as_its_slowest_part():
    planned = planned_for(random_llama(), "model.sharded=true", "model.bf16=true")
    hardware, base = planned.hardware, planned.base
    assert planned.pass_seconds(1e15, 2, 2, 8, 0.5) == pytest.approx(1e15 / (0.5 * hardware.bf16_flops))
    assert planned.pass_seconds(0, 2, 0, 8, 0.5) == pytest.approx(2 * base / hardware.memory_bandwidth)
    assert planned.pass_seconds(0, 2, 2, 64, 0.5) == pytest.approx(2 * base * 63 / 64 / hardware.link_between_nodes)


def test_full_fine_tuning_stores_fp32_weights_gradients_and_moments():
    planned = planned_for(random_llama(), "init=default", "peft=full_ft", "model.per_device_batch_size=1")
    parameters = sum(weight.numel() for weight in planned.skeleton.parameters())
    assert planned.training_memory(1) == 16 * parameters + planned.example(planned.run.model.max_length)
