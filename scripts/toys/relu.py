"""T4: a student with a ReLU learns a small low-rank change; the rate does not depend on the condition number.

f(x) = relu((W + B A) x), targets relu((W + D) x), loss ||f(X) - Y||^2 / (2 N). The adapter has the rank of D. The start
is spectral with gamma = 2, because the gradient at W is about -D / 2; then preconditioned descent, eq. 9 of
arXiv:2502.01235 with lambda = 0. A figure of the paper with its settings was not found. Ours: the sizes of the linear
problem, D with singular values from 0.1 down to 0.1 / kappa in equal ratios, and rate 1/2; for comparison, plain
descent with rate 5, which is 1/2 divided by the largest singular value.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from toys.adapters import Adapter, descend, descent, spectral
from toys.linear import SAMPLES, SIZE, TRUE_RANK, matrix_with

from lora_one.reports.figures import COLORS, INK, empty, legend

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONDITIONS, LARGEST, GAMMA, RATE, STEPS, SEED = (1, 10, 100), 0.1, 2.0, 0.5, 80, 0
CAPTION = "Error of the ReLU student, by the condition number of D"


class Row(NamedTuple):
    """condition: kappa.  relative_error: ||B A - D||_F / sigma_r(D).  bound: (1 - rate / 4)^step x that of step 0."""

    condition: int
    preconditioned: int
    step: int
    loss: float
    relative_error: float
    bound: float


class Student:
    """The problem for one condition number: W (m, n), D (m, n), X (N, n)."""

    def __init__(self, condition: float, seed: int):
        generator = torch.Generator().manual_seed(seed)
        singular = [LARGEST * condition ** (-place / (TRUE_RANK - 1)) for place in range(TRUE_RANK)]
        self.delta, self.smallest = matrix_with(singular, SIZE, generator), singular[-1]
        self.W = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
        self.X = torch.randn(SAMPLES, SIZE, generator=generator, dtype=torch.float64)
        self.targets = torch.relu(self.X @ (self.W + self.delta).T)

    def loss(self, product: Tensor) -> Tensor:
        """Return the loss of the student with this B A."""
        return (torch.relu(self.X @ (self.W + product).T) - self.targets).square().sum() / (2 * SAMPLES)

    def gradient(self) -> Tensor:
        """Return G = dL/dW at B A = 0."""
        shift = torch.zeros_like(self.W, requires_grad=True)
        return torch.autograd.grad(self.loss(shift), shift)[0]

    def error(self, product: Tensor) -> float:
        """Return ||B A - D||_F / sigma_r(D)."""
        return float((product.detach() - self.delta).norm()) / self.smallest


def rows(seed: int = SEED, conditions: Sequence[int] = CONDITIONS, steps: int = STEPS) -> list[Row]:
    """Train with and without preconditioner for each condition number; return a row per step."""
    found = []
    for condition in conditions:
        student = Student(condition, seed)
        factors = spectral(student.gradient(), TRUE_RANK, gamma=GAMMA)
        for preconditioned, rate, damping in ((1, RATE, 0.0), (0, RATE / LARGEST, None)):
            adapter = Adapter(factors)
            first = student.error(adapter.product())
            for step, loss in descend(adapter, student.loss, descent(adapter, rate, damping), steps):
                error, bound = student.error(adapter.product()), (1 - RATE / 4) ** step * first
                found.append(Row(condition, preconditioned, step, loss, error, bound))
    return found


def figure(found: Sequence[Row]) -> "Figure":
    """Plot the error relative to its start, with the claimed rate."""
    drawn, (axes,) = empty(3.4)
    runs = list(dict.fromkeys((row.condition, row.preconditioned) for row in found))
    conditions = list(dict.fromkeys(condition for condition, _ in runs))
    for condition, preconditioned in sorted(runs, key=lambda run: (-run[1], run[0])):
        line = [row for row in found if (row.condition, row.preconditioned) == (condition, preconditioned)]
        place = conditions.index(condition)
        style = {"color": COLORS[place], "marker": "osD"[place % 3], "linestyle": "-" if preconditioned else ":"}
        style |= {"linewidth": 1.4, "markersize": 4, "markevery": (4 * place, 12)}
        kind = "preconditioned" if preconditioned else "plain"
        label = f"\N{GREEK SMALL LETTER KAPPA} = {condition}, {kind}"
        values = [math.log(row.relative_error / line[0].relative_error) for row in line]
        axes.plot([row.step for row in line], values, label=label, **style)
    line = [row for row in found if (row.condition, row.preconditioned) == runs[0]]
    values = [math.log(row.bound / line[0].bound) for row in line]
    axes.plot([row.step for row in line], values, color=INK, linestyle="--", label="claimed: (1 - rate / 4)^step")
    axes.set(xlabel="step", ylabel="ln of the error / its value at step 0")
    legend(drawn, axes)
    return drawn
