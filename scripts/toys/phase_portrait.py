"""T3: three parameters, b (x . a), trained by gradient descent from LoRA's start and from the spectral start.

Four points x ~ N(0, I_2), y = x . (2, 1); loss sum (y - b x . a)^2 / 8; rate 0.1, 1,000 steps. LoRA: a ~ N(0, I) and
b = 0. The global minimisers are the hyperbola a = (2, 1) / b. The random numbers are drawn as published, in fp32 from
torch's global generator: the points, then a. The published code's spectral start uses sum y^2 x / 4; this uses the
gradient, -sum y x / 4, as the paper does. As a layer, B is b (1, 1), A is a (1, 2), and W is 0.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy
import torch
from torch import Tensor
from toys.adapters import Adapter, descend, descent, spectral

from lora_one.reports.figures import COLORS, INK, WIDTH, styled
from lora_one.seeding import seeded
from lora_one.types import AdapterFactors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEDS, BETA, POINTS, RATE, STEPS = (7, 3, 18), (2.0, 1.0), 4, 0.1, 1000
CAPTION = "Paths of gradient descent in the space of a and b"
LABELS = {"LoRA": "LoRA's start", "spectral": "spectral start"}


class Row(NamedTuple):
    """start: LoRA or spectral.  distance: from (a1, a2, b) to the nearest global minimiser."""

    seed: int
    start: str
    step: int
    a1: float
    a2: float
    b: float
    loss: float
    distance: float


def drawn_numbers(seed: int) -> tuple[Tensor, Tensor]:
    """Return the points (4, 2) and LoRA's a (1, 2), as published, in fp64."""
    with seeded(seed):
        points = torch.randn(POINTS, 2)
        return points.double(), torch.randn(2).double()[None]


def rows(seeds: Sequence[int] = SEEDS, steps: int = STEPS) -> list[Row]:
    """Train from both starts for each seed; return a row per seed, start and step."""
    found = []
    for seed in seeds:
        X, a = drawn_numbers(seed)
        y = X @ torch.tensor([BETA], dtype=torch.float64).T  # (4, 1)

        def loss(product: Tensor, X: Tensor = X, y: Tensor = y) -> Tensor:
            return (y - X @ product.T).square().sum() / (2 * POINTS)

        G = -(y.T @ X) / POINTS
        for start, factors in (("LoRA", AdapterFactors(torch.zeros(1, 1), a)), ("spectral", spectral(G, 1))):
            adapter = Adapter(factors)
            for step, value in descend(adapter, loss, descent(adapter, RATE), steps):
                (a1, a2), b = adapter.A.flatten().tolist(), adapter.B.item()
                found.append(Row(seed, start, step, a1, a2, b, value, distance(a1, a2, b)))
    return found


def distance(a1: float, a2: float, b: float) -> float:
    """Return the distance to the hyperbola ((2, 1) / t, t), t != 0.

    The squared distance is stationary where t^4 - b t^3 + (beta . a) t - beta . beta = 0.
    """
    squared, inner = sum(each**2 for each in BETA), BETA[0] * a1 + BETA[1] * a2
    roots = numpy.roots([1.0, -b, 0.0, inner, -squared])
    real = [root.real for root in roots if abs(root.imag) < 1e-6]
    return min(math.dist((a1, a2, b), (BETA[0] / t, BETA[1] / t, t)) for t in real)


def figure(found: Sequence[Row]) -> "Figure":
    """Draw the paths of each seed in three dimensions: a dot at the start, a star at the end, the hyperbola dashed."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    seeds = list(dict.fromkeys(row.seed for row in found))
    with styled(), rc_context({"grid.color": f"{INK}33"}):  # three-dimensional axes ignore grid.alpha
        drawn = Figure(figsize=(WIDTH, 2.9 + 2.6 * (len(seeds) > 1)))
        FigureCanvasAgg(drawn)
        grid = drawn.add_gridspec(2 if len(seeds) > 1 else 1, 2, height_ratios=(1.25, 1) if len(seeds) > 1 else (1,))
        for place, seed in enumerate(seeds[:3]):
            where = grid[0, :] if place == 0 else grid[1, place - 1]
            portrait(drawn.add_subplot(where, projection="3d"), [row for row in found if row.seed == seed])
        handles, labels = drawn.axes[0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="lower center", ncols=3, fontsize=8)
        drawn.subplots_adjust(left=0.02, right=0.93, bottom=0.11, top=0.95, hspace=0.2, wspace=0.2)
    return drawn


def portrait(axes: "object", found: Sequence[Row]) -> None:
    """Draw the paths of one seed."""
    low, high = (bound(row.b for row in found) for bound in (min, max))
    for color, (start, label) in zip(COLORS[1::-1], LABELS.items(), strict=True):
        path = [(row.a1, row.a2, row.b) for row in found if row.start == start]
        axes.plot(*zip(*path, strict=True), color=color, linewidth=1.6, label=label)
        axes.scatter(*path[0], color=color, marker="o", s=28, depthshade=False)
        axes.scatter(*path[-1], color=color, marker="*", s=70, depthshade=False)
    reach = max(max(abs(row.a1), abs(row.a2)) for row in found) + 0.4
    for branch in (numpy.linspace(low - 0.3, -0.01, 400), numpy.linspace(0.01, high + 0.3, 400)):
        kept = branch[(abs(BETA[0] / branch) < reach) & (branch * numpy.sign(branch[-1] or branch[0]) > 0)]
        if len(kept):
            name = None if any(line.get_label() == "global minimisers" for line in axes.lines) else "global minimisers"
            axes.plot(BETA[0] / kept, BETA[1] / kept, kept, color=INK, linestyle="--", linewidth=1.2, label=name)
    axes.view_init(elev=25, azim=-45)
    axes.set_box_aspect(None, zoom=1.2)
    axes.set_title(f"seed {found[0].seed}", fontsize=9, pad=0)
    axes.set(xlabel="a1", ylabel="a2", zlabel="b")
    axes.tick_params(labelsize=7, pad=-1)
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.labelpad = -3
        axis.set_pane_color((1, 1, 1, 0))
        axis.get_major_locator().set_params(nbins=4)
