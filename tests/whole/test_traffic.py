"""What two processes send each other, to the byte: gradients and factors at the start, adapter gradients in a step.

docs/scale.md has the formulas.
"""

import os

import pytest
import torch

from lora_one.data.encode import batches_of
from lora_one.distributed import Processes
from lora_one.initialization.low_rank_step import StepSettings
from lora_one.initialization.methods import build_init
from lora_one.initialization.solution import Probe
from lora_one.initialization.start import attach_adapters
from lora_one.models import weight_shape
from lora_one.records.tracking import Tracker
from lora_one.training.job import TrainingJob
from lora_one.training.loop import train
from tests.helpers.counting_group import join
from tests.helpers.examples import examples, linear_layers
from tests.helpers.models import random_llama
from tests.helpers.processes import results_of
from tests.helpers.runs import adaptation_for, run_config
from tests.helpers.training import settings
from tests.helpers.validation import validation_of

RANK = 4
WIDTHS = (64, 128)
SMALL = 64 * 2**10  # bytes of everything else, such as names of layers and counts of tokens
COUNT = 2


def model_of(width):
    return random_llama(hidden_size=width, intermediate_size=width + 16)


def started(group, width, memory):
    """What the start of a model sends, by operation."""
    run = run_config(f"peft.lora_r={RANK}", "init.scale=stable", "init.stable_gamma=16")
    probe = Probe(batches_of(examples(6), 1, 0), "example", StepSettings(memory=memory))
    group.take()
    attach_adapters(model_of(width), adaptation_for(run), build_init(run.init), probe, seed=0)
    return group.take()


def trained(group, folder, width, steps):
    """What so many training steps send, by operation, and the number of trained parameters."""
    run = settings("model.per_device_batch_size=1", f"model.epochs={steps}", f"peft.lora_r={RANK}")
    model = attach_adapters(model_of(width), adaptation_for(run), build_init(run.init), None, seed=0)[0]
    tracker = Tracker(folder / f"{width}-{steps}.jsonl", main_process=Processes.current().rank == 0)
    options = {"checkpoints": folder / f"points-{width}-{steps}", "pad_id": 0, "tracker": tracker}
    group.take()
    found = train(model, examples(run.model.real_batch_size), TrainingJob(run, adaptation_for(run), **options))
    assert found["steps"] == steps
    return group.take(), sum(p.numel() for p in model.parameters() if p.requires_grad)


def validated(group, width):
    model = model_of(width)
    group.take()
    validation_of(examples(9), "model.loss=example")(model)
    return group.take()


def work(rank, folder):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(COUNT), "LOCAL_WORLD_SIZE": str(COUNT)}
    group = join(folder, rank, COUNT)
    Processes.started()
    found = {("start", memory, width): started(group, width, memory) for memory in ("fast", "low") for width in WIDTHS}
    for width in WIDTHS:
        found |= {("train", width, steps): trained(group, folder, width, steps) for steps in (2, 5)}
        found["validation", width] = validated(group, width)
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = results_of(work, COUNT, "traffic", tmp_path_factory)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(COUNT)]


def shapes_of(width):
    return [weight_shape(layer) for layer in linear_layers(model_of(width)).values()]


@pytest.mark.parametrize("width", WIDTHS)
def test_the_start_sends_each_gradient_once_to_one_owner_and_its_step_back(ranks, width):
    """Sums of small models are in fp64; the step is U, S, V, its energy and its slopes in fp32."""
    shapes, k = shapes_of(width), RANK
    for rank in ranks:
        calls, sent = rank["start", "fast", width]
        assert calls["reduce"] == calls["broadcast"] == len(shapes)
        assert sent["reduce"] == sum(8 * m * n for m, n in shapes)
        assert sent["broadcast"] == sum(4 * (m * k + k + k * n + 1 + k) for m, n in shapes)
        assert sum(sent.values()) - sent["reduce"] - sent["broadcast"] < SMALL


def test_the_small_messages_do_not_grow_with_the_model(ranks):
    """Those of the low-memory start are more, as its sketch takes more or fewer rounds, but not larger."""
    for rank in ranks:
        for one in (("start", "fast"), ("start", "low"), ("validation",)):
            each = [
                {name: sent[name] / calls[name] for name in sent if "gather" in name}
                for calls, sent in (rank[(*one, width)] for width in WIDTHS)
            ]
            if "low" in one:
                assert max(*each[0].values(), *each[1].values()) < 256
            else:
                assert each[0] == each[1], one


@pytest.mark.parametrize("width", WIDTHS)
def test_a_training_step_sends_the_gradients_of_the_adapters_alone(ranks, width):
    """In fp32; and a number for each of the 28 matrices that says whether it took part in the loss."""
    for rank in ranks:
        (few, parameters), (more, _) = rank["train", width, 2], rank["train", width, 5]
        assert more[1]["allreduce"] - few[1]["allreduce"] == 3 * 4 * (parameters + 2 * len(shapes_of(width)))
        assert more[1].get("broadcast", 0) == few[1].get("broadcast", 0), "only at the beginning of training"
        others = [sum(sent.values()) - sent["allreduce"] for _, sent in (few, more)]
        assert (others[1] - others[0]) / 3 < 4096, "counts, losses and signals"


@pytest.mark.parametrize("width", WIDTHS)
def test_the_beginning_of_training_sends_the_adapters_and_not_the_base(ranks, width):
    for rank in ranks:
        (_, sent), parameters = rank["train", width, 2]
        assert sent["broadcast"] < 4 * parameters + SMALL
        assert 4 * sum(p.numel() for p in model_of(width).parameters()) > 4 * parameters + SMALL


def test_validation_sends_sums(ranks):
    for rank in ranks:
        for width in WIDTHS:
            calls, sent = rank["validation", width]
            assert set(calls) <= {"allgather", "_allgather_base"} and sum(sent.values()) < 4096
