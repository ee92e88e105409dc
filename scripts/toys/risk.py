"""T2: the spectral start against LoRA-GA and LoRA-SB on the linear problem, with and without preconditioners.

D has the singular values 1, 3/4, 1/2, 1/4. Published (the authors' notebook of 2025): the spectral start and
LoRA-GA with gamma 4, preconditioned descent with rate 1/2 and lambda 1e-3. Ours: plain descent, with rate 0.2 (at 1/2
LoRA-GA diverges), and all of LoRA-SB, whose core is trained with rate 1/2; its frozen factors are orthonormal, so a
preconditioner would change nothing.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from toys.adapters import Adapter, descend, descent, spectral, start
from toys.linear import RANK, LinearProblem

from lora_one.reports.figures import COLORS, empty, legend
from lora_one.types import AdapterFactors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SINGULAR, STEPS, SEED = (1.0, 0.75, 0.5, 0.25), 100, 0
RATE, PLAIN_RATE, DAMPING, GA_GAMMA = 0.5, 0.2, 1e-3, 4.0
CAPTION = "Risk of three starts on the linear problem"


class Row(NamedTuple):
    """method: the start.  preconditioned: 1 with eq. 9, 0 plain descent."""

    method: str
    preconditioned: int
    step: int
    loss: float
    ln_risk: float


def starts(problem: LinearProblem) -> dict[str, AdapterFactors]:
    """Return the three starts.

    LoRA-SB gets -G, not its sign as on real models, so it starts from the same product as the spectral start.
    """
    G = problem.gradient()
    return {
        "spectral": spectral(G, RANK),
        "LoRA-GA": start("lora_ga", G, RANK, stable_gamma=GA_GAMMA),
        "LoRA-SB": start("lora_sb", -G, RANK, eta=1.0),
    }


def rows(seed: int = SEED, steps: int = STEPS) -> list[Row]:
    """Train from each start; return a row per start, optimizer and step."""
    problem = LinearProblem.drawn(SINGULAR, seed)
    found = []
    for method, factors in starts(problem).items():
        # a method that keeps the function subtracts B A from W, so what remains to be learned is D + B A
        moved = problem.shifted(factors.B @ factors.A) if factors.shift_base else problem
        runs = [(1, RATE, DAMPING), (0, PLAIN_RATE, None)] if factors.R is None else [(0, RATE, None)]
        for preconditioned, rate, damping in runs:
            adapter = Adapter(factors)
            for step, loss in descend(adapter, moved.loss, descent(adapter, rate, damping), steps):
                found.append(Row(method, preconditioned, step, loss, moved.log_risk(adapter.product())))
    return found


def figure(found: Sequence[Row]) -> "Figure":
    """Plot ln risk over the steps, and again the first steps at a larger scale."""
    drawn, axes = empty(3.4, 2)
    methods = list(dict.fromkeys(row.method for row in found))
    for method, preconditioned in dict.fromkeys((row.method, row.preconditioned) for row in found):
        line = [row for row in found if (row.method, row.preconditioned) == (method, preconditioned)]
        place = methods.index(method)
        style = {"color": COLORS[place], "marker": "osD"[place], "linestyle": "-" if preconditioned else ":"}
        style |= {"linewidth": 1.4, "markersize": 4, "markevery": (2 * place, 8)}
        label = f"{method}, {'preconditioned' if preconditioned else 'plain'}"
        for part in axes:
            part.plot([row.step for row in line], [row.ln_risk for row in line], label=label, **style)
    for part in axes:
        part.set(xlabel="step", ylabel="ln risk")
    axes[1].set(xlim=(-0.5, 20), ylim=(-6, 0.3))
    legend(drawn, axes[0])
    return drawn
