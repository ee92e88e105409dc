"""The training loop on two processes, side by side with one."""

import os
from datetime import timedelta

import pytest
import torch
from accelerate import Accelerator
from torch import distributed as dist

from lora_one.distributed import Processes
from lora_one.files import read_lines
from lora_one.initialization.methods import build_init
from lora_one.initialization.start import attach_adapters
from lora_one.models import load_model
from lora_one.records.tracking import Tracker
from lora_one.training.callbacks import Recorder
from lora_one.training.job import TrainingJob
from lora_one.training.loop import train
from lora_one.training.trainer import FineTuner
from tests.helpers.examples import examples
from tests.helpers.models import random_llama, random_roberta
from tests.helpers.processes import results_of
from tests.helpers.runs import adaptation_for
from tests.helpers.training import settings
from tests.helpers.validation import counting, heads, validation_of

DATA = 16
PARTS = ("dataset.accuracy_examples=0", "model.epochs=1")
CASES = {
    "plain": ("model.epochs=2",),
    "dropout": ("model.epochs=3", "peft.lora_dropout=0.5", "model.save_steps=2"),
    "core": ("init=lora_xs", "model.epochs=2"),
}


def tuned(folder, *changes, base=None):
    """Factors and losses of a run in this folder; it goes on from a resume point that is there."""
    run = settings("model.per_device_batch_size=1", "optimizer.eps=1e-3", *changes)
    base = random_llama() if base is None else base
    model = attach_adapters(base, adaptation_for(run), build_init(run.init), None, seed=0)[0]
    processes = Processes.current()
    tracker = Tracker(folder / "metrics.jsonl", main_process=processes.rank == 0)
    options = {"checkpoints": folder / "checkpoints", "pad_id": 0, "tracker": tracker}
    train(model, examples(DATA, vocabulary=400), TrainingJob(run, adaptation_for(run), **options))
    factors = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return factors, [line["loss"] for line in read_lines(tracker.path)]


def next_draws(record, broadcasts, original):
    """training_step that notes what the generator of random numbers would give next, and whether DDP sends buffers."""

    def step(self, model, *arguments):
        with torch.random.fork_rng(devices=[]):
            record.append(torch.rand(4).tolist())
        broadcasts.append(model.will_sync_module_buffers())
        return original(self, model, *arguments)

    return step


def stopped(folder, step, *changes):
    """A run that ends after so many steps."""
    original = Recorder.on_log

    def stop(self, args, state, control, **rest):
        original(self, args, state, control, **rest)
        if state.global_step == step:
            raise KeyboardInterrupt

    Recorder.on_log = stop
    try:
        tuned(folder, *changes)
    except KeyboardInterrupt:
        return
    finally:
        Recorder.on_log = original


def tuned_in_parts(folder):
    """As on GPUs, where accelerate refuses DDP for a model with DTensors."""
    original, Accelerator.multi_device = Accelerator.multi_device, property(lambda _: True)
    try:
        base = load_model("bundled/tiny", dtype="fp32", shards=2)
        return tuned(folder, *PARTS, "model.sharded=true", base=base)
    finally:
        Accelerator.multi_device = original


def validated(build, make, *changes):
    """What validation on 13 examples gives, and the shapes of this process's passes."""
    model = build()
    shapes = counting(model)
    return validation_of(make(13), *changes)(model), shapes


VALIDATED = {
    "causal": (random_llama, examples, "model.loss=example"),
    "tokens": (random_llama, examples, "model.loss=token"),
    "head": (random_roberta, heads),
    "sharded": (
        random_llama,
        examples,
        "model.sharded=true",
        "model.per_device_batch_size=2",
        "dataset.accuracy_examples=0",
    ),
}


def results(folder):
    found = {name: validated(*case) for name, case in VALIDATED.items()}
    draws, broadcasts, original = [], [], FineTuner.training_step
    for case, changes in CASES.items():
        FineTuner.training_step = next_draws(draws, broadcasts, original)
        try:
            found[case] = tuned(folder / case, *changes)
        finally:
            FineTuner.training_step = original
    stopped(folder / "resumed", 5, *CASES["dropout"])
    found["in parts"] = tuned_in_parts(folder / "parts")
    return found | {"draws": draws, "broadcasts": broadcasts, "resumed": tuned(folder / "resumed", *CASES["dropout"])}


def work(rank, folder):
    """One of two processes, as a launcher starts them."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    where = {"init_method": f"file://{folder}/meeting", "rank": rank, "world_size": 2}
    dist.init_process_group("gloo", **where, timeout=timedelta(seconds=180))
    Processes.started()
    torch.save(results(folder), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes found."""
    folder = results_of(work, 2, "trainer", tmp_path_factory)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("case", ["plain", "core"])
def test_losses_are_those_of_one_process(ranks, tmp_path, case):
    factors, losses = tuned(tmp_path, *CASES[case])
    assert ranks[0][case][1] == pytest.approx(losses, rel=1e-5)
    for rank in ranks:
        for name, factor in factors.items():
            torch.testing.assert_close(rank[case][0][name], factor, rtol=1e-3, atol=1e-4, msg=name)


def test_a_base_in_parts_is_trained_as_a_whole_one(ranks, tmp_path):
    factors, losses = tuned(tmp_path, *PARTS, base=load_model("bundled/tiny", dtype="fp32"))
    assert ranks[0]["in parts"][1] == pytest.approx(losses, rel=1e-5)
    for rank in ranks:
        for name, factor in factors.items():
            torch.testing.assert_close(rank["in parts"][0][name], factor, rtol=1e-3, atol=1e-4, msg=name)


def test_frozen_factors_are_not_sent_to_the_other_process_in_every_step(ranks):
    """LoRA-XS keeps them as buffers, which DDP would broadcast in every forward pass."""
    for rank in ranks:
        assert rank["broadcasts"] and not any(rank["broadcasts"])


def test_processes_drop_different_entries(ranks):
    first, second = ({tuple(draw) for draw in rank["draws"]} for rank in ranks)
    assert first and second and not first & second


def test_resumed_on_two_processes_ends_with_the_same_bits(ranks):
    assert ranks[0]["resumed"][1] == ranks[0]["dropout"][1]  # the first process writes the losses
    for rank in ranks:
        straight, resumed = rank["dropout"][0], rank["resumed"][0]
        assert all(torch.equal(resumed[name], factor) for name, factor in straight.items())


@pytest.mark.parametrize("case", VALIDATED)
def test_validation_on_two_processes_gives_the_same_result(ranks, case):
    """13 examples: one process takes 7, the other 6; on a sharded model both do as many passes."""
    expected, whole = validated(*VALIDATED[case])
    (first, mine), (second, others) = (rank[case] for rank in ranks)
    assert first == second == pytest.approx(expected, rel=1e-6)
    assert sum(rows for rows, _ in whole) == 13
    assert [sum(rows for rows, _ in shapes) for shapes in (mine, others)] == ([7, 7] if case == "sharded" else [7, 6])
    assert case != "sharded" or len(mine) == len(others) == 4
