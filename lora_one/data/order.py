"""The order of training examples: global batches, and their division into micro-batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_one.distributed import Processes
from lora_one.seeding import generator_for


@dataclass
class MicroBatches:
    """The micro-batches of one process in one epoch, as lists of example indices.

    Each pair of seed and epoch has its own order. Every ``global_size`` consecutive examples of it are a global batch,
    independent of the micro-batch size and the number of processes. A global batch is sorted by length, the longest
    first, so that micro-batches have little padding, also across the processes at the same step.

    lengths: tokens of each example.  size: examples of a micro-batch; global_size is a multiple of size times the
    number of processes.  The last global batch of an epoch may be smaller: every process gets the same number of
    micro-batches, whose sizes differ by at most one; a size may be 0 if there are fewer examples than processes.
    """

    lengths: Sequence[int] | Tensor
    global_size: int
    size: int
    processes: Processes
    seed: int
    epoch: int = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; the Trainer calls this before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(len(self.lengths), self.global_size)
        return full * self.each(self.global_size) + self.each(rest)

    def each(self, examples: int) -> int:
        """Return the number of micro-batches per process for a global batch with this number of examples."""
        return -(-examples // (self.size * self.processes.count))

    def __iter__(self) -> Iterator[list[int]]:
        lengths = torch.as_tensor(self.lengths)
        for part in order_of(len(lengths), self.seed, self.epoch).split(self.global_size):
            batch = part[lengths[part].argsort(descending=True, stable=True)].tolist()
            cuts = self.each(len(batch)) * self.processes.count
            for cut in range(self.processes.rank, cuts, self.processes.count):
                yield batch[cut * len(batch) // cuts : (cut + 1) * len(batch) // cuts]


def order_of(count: int, seed: int, epoch: int) -> Tensor:
    """Return the order of one epoch, a permutation of range(count), int64, independent for every seed and epoch."""
    return torch.randperm(count, generator=generator_for(seed, f"order of epoch {epoch}"))


def fitting(order: Sequence[int], lengths: Sequence[int] | Tensor, tokens: int) -> Sequence[int]:
    """Return the first examples of an order that have at most ``tokens`` tokens with padding; at least one example.

    order: descending in length, so the first example determines the padded length.
    """
    return order[: max(1, tokens // int(lengths[order[0]]))]
