"""Micro-batches by length inside each global batch: which examples, how many, on which process."""

from itertools import chain, pairwise

import pytest
import torch

from lora_one.data.order import MicroBatches
from lora_one.distributed import Processes
from lora_one.seeding import generator_for

LENGTHS = torch.randint(3, 90, (70,), generator=torch.Generator().manual_seed(0)).tolist()


def micro_batches(count=1, size=4, global_size=24, seed=7, epoch=0, lengths=LENGTHS):
    """Of every process, by rank."""
    orders = [MicroBatches(lengths, global_size, size, Processes(rank, count), seed, epoch) for rank in range(count)]
    assert all(len(order) == len(list(order)) for order in orders)
    return [list(order) for order in orders]


def global_batches(ranks, accumulation):
    """The examples of every optimizer step: of so many micro-batches after another, on all processes."""
    steps = range(0, len(ranks[0]), accumulation)
    return [[i for rank in ranks for batch in rank[step : step + accumulation] for i in batch] for step in steps]


@pytest.mark.parametrize(("count", "size"), [(1, 1), (1, 4), (1, 24), (2, 1), (2, 4), (3, 4), (2, 12), (3, 8)])
@pytest.mark.parametrize("epoch", [0, 1])
def test_global_batches_are_cuts_of_one_random_order_however_they_are_shared_out(count, size, epoch):
    order = torch.randperm(70, generator=generator_for(7, f"order of epoch {epoch}")).tolist()
    found = global_batches(micro_batches(count, size, epoch=epoch), 24 // (count * size))
    assert [sorted(batch) for batch in found] == [sorted(order[start : start + 24]) for start in (0, 24, 48)]


def test_no_two_seeds_or_epochs_share_an_order():
    """Seed 1 in epoch 1 must not see the order of seed 2 in epoch 0."""
    orders = {
        tuple(chain(*micro_batches(size=24, seed=seed, epoch=epoch)[0])) for seed in range(4) for epoch in range(4)
    }
    assert len(orders) == 16


@pytest.mark.parametrize("count", [1, 2, 3])
def test_micro_batches_are_sorted_by_length(count):
    """At each accumulation step, no process has a longer example than any process at the step before."""
    ranks = micro_batches(count)
    beside = [[LENGTHS[i] for batch in together for i in batch] for together in zip(*ranks, strict=True)]
    accumulation = 24 // (4 * count)
    for step in range(0, len(beside), accumulation):
        for before, after in pairwise(beside[step : step + accumulation]):
            assert min(before) >= max(after)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("rest", range(1, 24))
def test_the_last_smaller_batch_is_cut_evenly_and_repeats_nothing(count, rest):
    ranks = micro_batches(count, lengths=LENGTHS[: 24 + rest])
    assert len({len(rank) for rank in ranks}) == 1, "every process takes as many steps"
    last = [batch for rank in ranks for batch in rank[24 // (4 * count) :]]
    sizes = [len(batch) for batch in last]
    assert sum(sizes) == len(set(chain(*last))) == rest
    assert max(sizes) <= 4 and max(sizes) - min(sizes) <= 1


def test_padding_shrinks():
    def padded(batches):
        return sum(len(batch) * max(LENGTHS[i] for i in batch) for batch in batches)

    (mine,) = micro_batches()
    order = torch.randperm(70, generator=generator_for(7, "order of epoch 0")).tolist()
    assert padded(mine) < 0.8 * padded([order[start : start + 4] for start in range(0, 70, 4)])
