"""Warn if steps of an optimizer of pairs overshoot at the start, because B A is small."""

from collections.abc import Iterable
from statistics import median

import torch

from lora_one.optim.paired import PairOptimizer
from lora_one.optim.pairs import Pair


def overshoot_warnings(optimizer: type[PairOptimizer], name: str, pairs: Iterable[Pair], lr: float) -> list[str]:
    """Return a warning if, in half of the layers, the cross term of the first step exceeds the intended step; else [].

    A step changes s B A by s (D_B A + B D_A) + s D_B D_A, and only the first two terms are intended. In LoRA-Muon and
    LoRA-RITE D_B = P_B (A A^T)^-1/2 and D_A = (B^T B)^-1/2 P_A, and (A A^T)^-1/2 (B^T B)^-1/2 has the spectral norm
    1 / sigma_r(B A), so

        ||s D_B D_A|| / max(||s D_B A||, ||s B D_A||) = min(||s D_B A||, ||s B D_A||) / sigma_r(s B A)

    if P_B and P_A have r equal singular values, as in the first step; see `PairOptimizer.first_change`.

    name: of the optimizer, for the message.  lr: learning rate of the pairs.  Layers with B = 0 or A = 0 have no cross
    term in the first step, because only one factor moves.
    """
    found = []
    for pair in pairs:
        change = optimizer.first_change(lr, pair.scaling, len(pair.B), pair.A.shape[1])
        smallest = smallest_singular_value(pair)
        found.append((change / smallest, smallest) if change is not None and smallest > 0 else (0.0, 0.0))
    share = median(ratio for ratio, _ in found) if found else 0.0
    if share <= 1:
        return []
    size = median(smallest for _, smallest in found)
    return [
        f"optimizer={name} overshoots at the start with model.learning_rate={lr:g}: B A is so small (smallest singular "
        f"value of s B A: {size:.2g}, median of the layers) that the product of the changes of B and A is {share:.3g} "
        "times the intended step, and it should be at most as large: begin with B = 0 or with a larger B A, use "
        f"another optimizer, or model.learning_rate={lr / share:.2g} or less"
    ]


@torch.no_grad()
def smallest_singular_value(pair: Pair) -> float:
    """Return the smallest singular value of s B A that is not zero up to rounding; 0 if B A = 0."""
    R_B, R_A = (torch.linalg.qr(factor.cpu().double(), mode="r").R for factor in (pair.B, pair.A.T))
    values = torch.linalg.svdvals(R_B @ R_A.T)
    rounding = len(values) * torch.finfo(pair.B.dtype).eps * values[0]
    return pair.scaling * float(values[values > rounding].min()) if values[0] > 0 else 0.0
