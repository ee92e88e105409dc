"""The bytes that the processes of a run send to each other, as formulas of its shapes.

Small messages are left out: counts of tokens, losses, signals and errors, less than 10 kB for each step or pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass

Shapes = Sequence[tuple[int, int]]  # (m, n) of each adapted layer


@dataclass(frozen=True)
class Traffic:
    """Bytes of the tensors in each kind of collective operation, added up over its calls.

    all_reduced: sums that every process gets.  reduced: sums that one process gets.  broadcast: from one to all.
    gathered: whole tensors that every process puts together from the parts of all that share a copy of the base.
    """

    all_reduced: float = 0
    reduced: float = 0
    broadcast: float = 0
    gathered: float = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def times(self, number: float) -> "Traffic":
        """Return the traffic of this number of repetitions."""
        return Traffic(**{name: number * value for name, value in vars(self).items()})

    def sent(self, processes: int, shards: int | None = None) -> float:
        """Return the bytes that each of N processes sends in a ring. shards: of each gathering; None: all processes.

        A tensor of S bytes: 2 S (N - 1) / N for a sum on all processes, S (N - 1) / N for a sum on one, a broadcast or
        a gathering; the first two and the last are the least possible (arXiv:1802.05799).

        >>> Traffic(all_reduced=100).sent(4), Traffic(gathered=100).sent(4), Traffic(gathered=100).sent(4, shards=2)
        (150.0, 75.0, 50.0)
        """
        shards = shards or processes
        everywhere = (2 * self.all_reduced + self.reduced + self.broadcast) * (processes - 1) / processes
        return everywhere + self.gathered * (shards - 1) / shards


def training_step(trainable: int, base: float, micro_batches: int) -> Traffic:
    """Return the traffic of one optimizer step: DDP averages the fp32 gradients once, in its last micro-batch.

    base: bytes of a sharded base, which is gathered for the forward and for the backward pass of each micro-batch;
    0: not sharded.
    """
    return Traffic(all_reduced=4 * trainable, gathered=2 * base * micro_batches)


def training_begin(trainable: int) -> Traffic:
    """Return the traffic of DDP before the first step: the first process sends the trained weights, in fp32."""
    return Traffic(broadcast=4 * trainable)


def shared_steps(shapes: Shapes, singular: int) -> Traffic:
    """Return the traffic of the low-rank steps: each layer's owner sends U, S, Vh, energy and slopes, fp32."""
    return Traffic(broadcast=4 * sum(singular * (m + n) + 2 * singular + 1 for m, n in shapes))


def summed_gradients(shapes: Shapes, itemsize: int) -> Traffic:
    """Return the traffic of the whole gradients: each layer's sum is sent to its owner. itemsize: of the sums."""
    return Traffic(reduced=itemsize * sum(m * n for m, n in shapes))


def summed_sketches(shapes: Shapes, width: int, probes: int, itemsize: int, passes: int) -> Traffic:
    """Return the traffic of a sketch with this number of passes: every process gets each layer's product in each pass.

    G Omega of the first pass has ``probes`` further columns; then G^T Q (n, width) and G P (m, width) alternate. It is
    less if some layers settle earlier, because they take no part in later passes.
    """
    left, right = sum(m for m, _ in shapes), sum(n for _, n in shapes)
    products = left * (width + probes) + width * (right * (passes // 2) + left * ((passes - 1) // 2))
    return Traffic(all_reduced=itemsize * products)


def summed_moments(shapes: Shapes, inputs: Sequence[int], rank: int, itemsize: int) -> Traffic:
    """Return the traffic of second moments: sums of C (n, n) in fp64 for each input, of G and of D (m,) for each layer,
    and B, A and two figures from the owner, fp32. inputs: n of each group of layers with the same input.
    """
    sums = 8 * sum(n * n for n in inputs) + sum(itemsize * m * n + 8 * m for m, n in shapes)
    return Traffic(reduced=sums, broadcast=4 * sum(rank * (m + n) + 2 for m, n in shapes))


def chosen_ranks(shapes: Shapes, largest: int) -> Traffic:
    """Return the traffic of a start that chooses the ranks: A (R, n) and G A^T (m, R) for the largest rank R, fp32."""
    return Traffic(broadcast=4 * largest * sum(m + n for m, n in shapes))
