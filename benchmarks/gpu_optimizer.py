"""The part ``optimizer`` of gpu.py: a step of fused AdamW, with ours and PEFT's preconditioner, and of LoRA pairs."""

import warnings
from collections.abc import Sequence

import torch
from bench_optimizer import ALONE, MUON, OURS, PEFT, RITE, Gradients, Make, adapters, error_of, makers, pair_makers
from common import Shape
from rows import Row, Table, synchronized, timed
from torch import nn

WARM, TURNS = 3, 21


def measure(table: Table, shape: Shape, device: str, ranks: Sequence[int]) -> None:
    """Measure a step at every rank, on fp32 factors of every linear layer with random gradients."""
    for rank in ranks:
        for name, make in (makers(device) | pair_makers()).items():
            table.row(
                f"{name}, r={rank}", lambda name=name, make=make, rank=rank: step(shape, rank, device, name, make)
            )
            table.write(ratios=ratios(table, ranks))


def step(shape: Shape, rank: int, device: str, name: str, make: Make) -> Row:
    """Measure one optimizer. error: largest relative error of the preconditioned gradient against eq. 9 in fp64."""
    torch.manual_seed(0)
    with torch.device(device):
        model: nn.Module = adapters(shape, rank)
    gradients = Gradients(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        error = error_of(make, model, gradients) if name in (OURS, PEFT) else None
    optimizer = make(model, lr=1e-6, fused=True)
    turns: list[float] = []

    def turn() -> None:
        gradients.restore()
        began = synchronized()
        optimizer.step()
        turns.append(synchronized() - began)

    row = timed(lambda: [turn() for _ in range(WARM + TURNS)], repeats=1, warm_up=False)
    steady = sorted(turns[WARM:])
    middle = steady[len(steady) // 2]
    row |= {"seconds": middle, "milliseconds": 1e3 * middle, "slowest": steady[-1], "fastest": steady[0]}
    return row | {"turns": turns, "error_to_eq_9": error, "pairs": len(model)}


def ratios(table: Table, ranks: Sequence[int]) -> dict[str, float]:
    found = {}
    for rank in ranks:
        for name in (OURS, PEFT, MUON, RITE):
            above, below = table.value(f"{name}, r={rank}"), table.value(f"{ALONE}, r={rank}")
            if above and below:
                found[f"step, {name} / {ALONE}, r={rank}"] = above / below
    return found
