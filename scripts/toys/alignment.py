"""T1: gradient descent from LoRA's start aligns A with the leading directions of the one-step gradient.

B = 0 and A ~ N(0, alpha^2); D has four singular values 1. Gradient descent with rate 1/64 for both factors.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from toys.adapters import Adapter, descend, descent
from toys.linear import RANK, SIZE, TRUE_RANK, LinearProblem

from lora_one.diagnostics import principal_angles
from lora_one.reports.figures import empty, legend
from lora_one.types import AdapterFactors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VARIANCES, RATE, STEPS, EVERY, SEED = (1.0, 0.1, 1e-2, 1e-3, 1e-4), 1 / 64, 1500, 5, 0
CAPTION = "Risk and alignment of gradient descent from LoRA's start, by the variance of A"


class Row(NamedTuple):
    """variance: alpha^2.  sine: of the largest principal angle between the 4 leading row directions of A and of G."""

    variance: float
    step: int
    loss: float
    ln_risk: float
    sine: float


def rows(seed: int = SEED, variances: Sequence[float] = VARIANCES, steps: int = STEPS, every: int = EVERY) -> list[Row]:
    """Train from each start on one problem; return a row per start and measured step."""
    problem = LinearProblem.drawn([1.0] * TRUE_RANK, seed)
    wanted = leading_rows(problem.gradient())
    found = []
    for variance in variances:
        A = math.sqrt(variance) * torch.randn(RANK, SIZE, generator=problem.generator, dtype=torch.float64)
        adapter = Adapter(AdapterFactors(torch.zeros(SIZE, RANK), A))
        for step, loss in descend(adapter, problem.loss, descent(adapter, RATE), steps):
            if step % every == 0:
                angle = principal_angles(leading_rows(adapter.A.detach()), wanted)[-1]
                sine = math.sin(math.radians(float(angle)))
                found.append(Row(variance, step, loss, problem.log_risk(adapter.product()), sine))
    return found


def leading_rows(matrix: Tensor) -> Tensor:
    """Return the leading right singular vectors as orthonormal columns (n, 4)."""
    return torch.linalg.svd(matrix, full_matrices=False).Vh[:TRUE_RANK].T


def figure(found: Sequence[Row]) -> "Figure":
    """Plot ln risk and the sine over the steps, a line for each variance."""
    from matplotlib import colormaps

    drawn, axes = empty(3.2, 2)
    variances = list(dict.fromkeys(row.variance for row in found))
    for place, variance in enumerate(variances):
        line = [row for row in found if row.variance == variance]
        style = {"color": colormaps["plasma"](0.9 * place / max(1, len(variances) - 1)), "linewidth": 1.2}
        style |= {"marker": "osD^v"[place % 5], "markersize": 3, "markevery": max(1, len(line) // 20)}
        steps = [row.step for row in line]
        axes[0].plot(
            steps, [row.ln_risk for row in line], label=f"\N{GREEK SMALL LETTER ALPHA}² = {variance:g}", **style
        )
        axes[1].plot(steps, [row.sine for row in line], **style)
    axes[0].set(xlabel="step", ylabel="ln risk")
    axes[1].set(xlabel="step", ylabel="sine of the largest angle", ylim=(0, 1.05))
    legend(drawn, axes[0])
    return drawn
