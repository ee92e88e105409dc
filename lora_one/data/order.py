"""In which order examples are trained on: the global batches, and how each is cut into micro-batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from lora_one.distributed import Processes
from lora_one.seeding import generator_for


@dataclass
class MicroBatches:
    """Indices of the examples of one process's micro-batches, through one epoch.

    Each pair of seed and epoch has an order of its own. Every ``global_size`` consecutive examples of it are a global
    batch, whatever the size of micro-batches and the number of processes. A global batch is sorted by length, the
    longest first, so that a micro-batch, and those of the other processes at the same step, hold little padding.

    lengths: tokens of each example.  size: examples of a micro-batch, of which global_size is a multiple on all
    processes together.  An epoch's last global batch may be smaller: every process gets as many micro-batches of it,
    of sizes that differ by one at most, which may be 0 where there are fewer examples than processes.
    """

    lengths: Sequence[int]
    global_size: int
    size: int
    processes: Processes
    seed: int
    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        """For the Trainer, which calls it before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(len(self.lengths), self.global_size)
        return full * self.each(self.global_size) + self.each(rest)

    def each(self, examples: int) -> int:
        """Micro-batches of every process that so many examples are cut into."""
        return -(-examples // (self.size * self.processes.count))

    def __iter__(self) -> Iterator[list[int]]:
        order = order_of(len(self.lengths), self.seed, self.epoch)
        for start in range(0, len(order), self.global_size):
            batch = sorted(order[start : start + self.global_size], key=lambda i: self.lengths[i], reverse=True)
            cuts = self.each(len(batch)) * self.processes.count
            for cut in range(self.processes.rank, cuts, self.processes.count):
                yield batch[cut * len(batch) // cuts : (cut + 1) * len(batch) // cuts]


def order_of(count: int, seed: int, epoch: int) -> list[int]:
    """The examples' order in one epoch: a permutation of range(count), independent for every seed and every epoch."""
    return torch.randperm(count, generator=generator_for(seed, f"order of epoch {epoch}")).tolist()


def fitting(order: Sequence[int], lengths: Sequence[int], tokens: int) -> Sequence[int]:
    """The beginning of an order that holds at most so many tokens when padded to its longest; at least one example.

    order: the longest first, so that its first example is the longest of the batch.
    """
    return order[: max(1, tokens // lengths[order[0]])]
