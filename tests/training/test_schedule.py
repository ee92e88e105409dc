"""The loop against a hand-written one: same batches, same loss, same weights."""

import pytest
import torch

from lora_one.errors import UsageError
from lora_one.training.schedule import accumulation_steps, micro_batch, refuse_idle, refuse_no_learning, total_steps
from tests.helpers.examples import examples
from tests.helpers.training import adapted, settings, trained


def test_steps_and_accumulation():
    model = settings("model.real_batch_size=32", "model.per_device_batch_size=4", "model.epochs=1.5").model
    assert accumulation_steps(model, 1) == 8 and accumulation_steps(model, 2) == 4
    assert total_steps(100, model) == 6  # 4 steps an epoch, the last over 4 examples
    with pytest.raises(UsageError, match=r"32 is not divisible by 3 processes: set it to a multiple of 3, or start 2"):
        micro_batch(model, 3)


@pytest.mark.parametrize(("processes", "size", "steps"), [(1, 12, 2), (2, 12, 1), (3, 8, 1), (6, 4, 1), (24, 1, 1)])
def test_micro_batches_fit_the_share_of_a_process(processes, size, steps):
    model = settings("model.real_batch_size=24", "model.per_device_batch_size=12").model
    assert micro_batch(model, processes) == size and accumulation_steps(model, processes) == steps


@pytest.mark.parametrize(("epochs", "each", "steps"), [(1.1, 50, 55), (0.07, 100, 7), (1.5, 5, 8), (3, 7, 21)])
def test_a_fraction_of_an_epoch_is_not_a_step_too_long(epochs, each, steps):
    """1.1 * 50 is 55.00000000000001 in floating point."""
    model = settings(f"model.epochs={epochs}", "model.real_batch_size=4", "model.per_device_batch_size=4").model
    assert total_steps(4 * each, model) == steps


def test_a_run_that_only_warms_up_is_refused(tmp_path):
    """Its one step has learning rate 0: the adapter would end as it began."""
    data = examples(6)
    before = {name: p.clone() for name, p in adapted(settings()).named_parameters() if p.requires_grad}
    for warmup in ("0.03", "1", "100"):
        run = settings(f"model.warmup={warmup}")
        with pytest.raises(UsageError, match=r"model.warmup=.* only one step.*: set model.warmup=0"):
            refuse_no_learning(6, run.model)
        factors, _ = trained(run, tmp_path / warmup, data)
        assert all(torch.equal(factors[name], value) for name, value in before.items())
    for learns in ("model.warmup=0", "model.epochs=2", "model.real_batch_size=3"):
        run = settings("model.warmup=1", learns)
        refuse_no_learning(6, run.model)
        factors, _ = trained(run, tmp_path / learns, data)
        assert not all(torch.equal(factors[name], value) for name, value in before.items())


def test_as_many_processes_as_examples_are_enough():
    refuse_idle(4, 4)
    with pytest.raises(UsageError, match=r"^5 processes are more than the 4 training examples: start at most 4"):
        refuse_idle(4, 5)
