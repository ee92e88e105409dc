"""The factors of each layer, from the layer and its low-rank step or its moments, with figures for run.json."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lora_one.adaptation.layers import ADAPTER, layer_view, refuse_quantised
from lora_one.distributed import Processes
from lora_one.initialization.backward import GradientReport
from lora_one.initialization.low_rank_step import Step
from lora_one.initialization.methods import Method
from lora_one.initialization.moments import Moments
from lora_one.initialization.solution import Solution
from lora_one.linalg import truncated_svd
from lora_one.models import weight_shape
from lora_one.types import AdapterFactors, LayerView

OUTSIDE = 1e-4  # share of a factor's square norm that rounding may put outside of a span


@dataclass
class LayerStarts:
    """The factors of the layers computed so far, and their figures for run.json.

    keep_vectors: store the leading singular vectors of the gradients.  decreases: first-order decreases of the loss;
    None: not known.
    """

    layers: dict[str, Any]
    method: Method
    seed: int
    originals: Callable[[str], Tensor] | None
    keep_vectors: bool
    factors: dict[str, AdapterFactors] = field(default_factory=dict)
    energies: dict[str, float] = field(default_factory=dict)
    decreases: list[float | None] = field(default_factory=list)
    vectors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def add(self, name: str, step: Step | None) -> None:
        """Compute the factors of one layer.

        Raises UsageError: the method changes the base, and this layer is quantised or sharded.
        """
        layer = self.layers[name]
        found = self.method.factors(self.view(name), step)
        if found.shift_base:
            refuse_quantised(name, layer.get_base_layer())
        if step is not None:
            self.energies[name] = step.energy
            if self.keep_vectors:
                r = layer.r[ADAPTER]
                self.vectors[name] = (step.U[:, :r].cpu(), step.Vh[:r].cpu())
            self.decreases.append(0.0 if found.shift_base else first_order(found, step, layer.scaling[ADAPTER]))
        self.factors[name] = found

    def view(self, name: str) -> LayerView:
        """Return what the method can read of one layer."""
        return layer_view(name, self.layers[name], self.seed, self.originals)

    def add_from_moments(self, name: str, owner: int, moments: Moments | None) -> None:
        """Compute the factors of one layer on its owner, which alone has the moments, and send them to all processes.

        Raises ValueError, on every process: see the method.
        """
        processes, layer = Processes.current(), self.layers[name]
        m, n = weight_shape(layer.get_base_layer())
        r, message, own = layer.r[ADAPTER], "", None
        if moments is not None:
            try:
                own = self.measured(name, moments)
            except ValueError as error:
                message = str(error)
        for refused in filter(None, processes.gathered(message)):
            raise ValueError(refused)
        device = layer.get_base_layer().weight.device
        sizes = [m * r, r * n, 2, m * r * self.keep_vectors, r * n * self.keep_vectors]
        flat = torch.empty(sum(sizes), device=device) if own is None else own.to(device)
        B, A, figures, U, Vh = processes.from_owner(owner, flat).split(sizes)
        self.factors[name] = AdapterFactors(B.view(m, r), A.view(r, n))
        self.energies[name], decrease = figures.tolist()
        self.decreases.append(decrease)
        if self.keep_vectors:
            self.vectors[name] = (U.view(m, r).cpu(), Vh.view(r, n).cpu())

    def measured(self, name: str, moments: Moments) -> Tensor:
        """Return one vector of: B, A, the share of ||G||^2 in the span of A, the decrease, and the vectors of [G]_r."""
        layer, G, view = self.layers[name], moments.gradient, self.view(name)
        found = self.method.factors(view, moments)
        rows = torch.linalg.qr(found.A.T.to(G)).Q
        energy = (G @ rows).square().sum() / G.square().sum()
        decrease = -layer.scaling[ADAPTER] * ((G.T @ found.B.to(G)) * found.A.T.to(G)).sum()
        parts = [found.B, found.A, torch.stack([energy, decrease])]
        if self.keep_vectors:
            step = truncated_svd(G, view.rank, tolerance=self.method.settings.tolerance, generator=view.generator)
            parts += [step.U, step.Vh]
        return torch.cat([part.float().reshape(-1) for part in parts])

    def solution(self, report: GradientReport) -> Solution:
        """Return the solution of a method that uses a gradient."""
        decrease = None if None in self.decreases else sum(self.decreases)
        return Solution(self.factors, self.energies, report, decrease, vectors=self.vectors)

    def rearranged(self, solution: Solution) -> Solution:
        """Return the solution with rearranged factors of the same scale.

        Neither their first-order decrease nor their loss is known: ``first_order`` needs factors in the basis of the
        step, and the search measured the loss of the others.
        """
        factors = {name: self.method.rearrange(self.view(name), found) for name, found in solution.factors.items()}
        return replace(solution, factors=factors, predicted_decrease=None, loss=None)


def first_order(factors: AdapterFactors, step: Step, scaling: float) -> float | None:
    """Return - s <G, B R A>; None: neither B R nor A is in the span of the step's vectors, as may be in an own method.

    G - U diag(S) Vh is orthogonal to both spans, so one is enough. With a transform of G, exact for factors that are
    diagonal in this basis.
    """
    B = factors.B if factors.R is None else factors.B @ factors.R
    left, right = step.U.T @ B, factors.A @ step.Vh.T
    if not (in_span(left, B) or in_span(right, factors.A)):
        return None
    return -scaling * float(((left * right.T).sum(dim=1) * step.slopes).sum())


def in_span(projected: Tensor, factor: Tensor) -> bool:
    """Return whether the projection of a factor onto orthonormal vectors is the whole factor, up to fp32 rounding."""
    return bool(factor.square().sum() - projected.square().sum() <= OUTSIDE * factor.square().sum())
