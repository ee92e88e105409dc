"""Low-rank steps of mean gradients that are never completely in memory: a block Krylov space computed by passes.

A pass over the batches computes G V (m x k) or G^T Q (n x k) of every layer, from dY^T (X V) or X^T (dY Q). A layer
needs (m + n) x k numbers for each block; each product costs a forward and a backward pass over all batches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lora_one.distributed import Processes
from lora_one.initialization.backward import GradientReport, backward_passes
from lora_one.initialization.gradients import refuse_unused, sum_dtype, wide_dtype, zero_gradient
from lora_one.linalg import KrylovSpace, LowRank, fix_signs
from lora_one.losses import Batch, Reduction
from lora_one.models import weight_shape
from lora_one.seeding import generator_for

PROBES = 8  # random columns of the first pass that only measure how much of G lies outside the subspace


def sketched_steps(
    model: nn.Module,
    layers: dict[str, nn.Module],
    batches: Sequence[Batch],
    reduction: Reduction,
    consume: Callable[[str, LowRank], None],
    *,
    singular_of: Callable[[str], int],
    tolerance: float,
    seed: int,
    checkpointing: bool = False,
) -> GradientReport:
    """Pass the leading ``singular_of(name)`` singular values and vectors of each layer's gradient to ``consume``.

    A layer's space, random numbers and stopping rule are those of ``truncated_svd`` applied to the whole gradient, so
    both results agree up to rounding. The passes end when the spaces of all layers have settled; settled layers take no
    part in further passes.

    The energy divides by ||G||^2 = ||Q^T G||^2 + ||(I - Q Q^T) G||^2, where Q contains all left columns. The first term
    is known; the second is estimated without bias (Hutch++, arXiv:2010.09649) as ||(I - Q Q^T) G Psi||^2 / 8, with 8
    Gaussian columns Psi that are independent of Q. So only the share of G outside Q is uncertain. Its relative standard
    deviation is at most one half, if all of it lies in one direction, and less if it is spread over several.

    Raises ValueError, on every process: see ``backward_passes``; a layer took no part in the loss, or its gradient is
    zero or not finite (the layer is named).
    """
    passes = Passes(model, batches, reduction, checkpointing)
    spaces = {name: KrylovSpace(weight_shape(layer), singular_of(name), tolerance) for name, layer in layers.items()}
    right = {name: _omega(name, layers[name], space, seed) for name, space in spaces.items()}
    report, products = passes.multiply(layers, right)  # G [Omega, Psi]
    aside: dict[str, Tensor] = {}  # G Psi
    for name, product in products.items():
        _refuse_unusable(name, product)
        width = spaces[name].width
        products[name], aside[name] = product[:, :width], product[:, width:].clone()
    while True:
        left = {name: spaces[name].add_left(product) for name, product in products.items()}
        left = {name: Q for name, Q in left.items() if not spaces[name].settled}
        if not left:
            break
        _, products = passes.multiply({name: layers[name] for name in left}, left, transposed=True)  # G^T Q
        right = {name: spaces[name].add_right(product) for name, product in products.items()}
        right = {name: P for name, P in right.items() if not spaces[name].settled}
        if not right:
            break
        _, products = passes.multiply({name: layers[name] for name in right}, right)  # G P
    for name in layers:
        consume(name, _low_rank(spaces.pop(name), aside[name]))
    return report


def _low_rank(space: KrylovSpace, aside: Tensor) -> LowRank:
    """Return the low-rank step from a settled space. aside: G Psi, for the energy."""
    U, S, Vh = space.svd()
    outside = aside - space.Q @ (space.Q.T @ aside)
    total = float(space.T.square().sum() + outside.square().sum().cpu() / PROBES)
    energy = min(1.0, float(S.double().square().sum()) / total)
    return fix_signs(LowRank(U, S, Vh, energy))


def _refuse_unusable(name: str, product: Tensor) -> None:
    """Raise ValueError if a product with random columns shows that the gradient is zero or not finite."""
    if not product.any():
        raise zero_gradient(name)
    if not torch.isfinite(product).all():
        raise ValueError(f"the gradient of layer {name} contains values that are not finite")


def _omega(name: str, layer: nn.Module, space: KrylovSpace, seed: int) -> Tensor:
    """Return the Gaussian columns of the space, followed by ``PROBES`` others."""
    generator = generator_for(seed, f"low-rank step of {name}")
    psi = torch.randn(weight_shape(layer)[1], PROBES, generator=generator_for(seed, f"energy of {name}"))
    return torch.cat([space.start(generator), psi], dim=1).to(layer.weight.device)


@dataclass(frozen=True)
class Passes:
    """Forward and backward passes over the batches, each of which multiplies the layers' gradients by thin matrices."""

    model: nn.Module
    batches: Sequence[Batch]
    reduction: Reduction
    checkpointing: bool

    def multiply(
        self, layers: dict[str, nn.Module], factors: dict[str, Tensor], *, transposed: bool = False
    ) -> tuple[GradientReport, dict[str, Tensor]]:
        """Return G V of every layer, or with ``transposed`` G^T Q, the same on every process.

        factors: V (n, k) or Q (m, k) by layer.
        """
        sums = ProductSums(factors, transposed, sum_dtype(self.model, layers))
        report = backward_passes(
            self.model, layers, self.batches, self.reduction, sums.add, checkpointing=self.checkpointing
        )
        refuse_unused(layers, sums.totals.keys())
        processes, wide = Processes.current(), wide_dtype(self.model)
        # in the order of ``layers``, which is the same on every process, because the sums are collective operations
        return report, {name: processes.sum(sums.take(name, layer)).to(wide) for name, layer in layers.items()}


@dataclass
class ProductSums:
    """Sums, over the batches of this process, of dY^T (X V) of every layer, or with ``transposed`` of X^T (dY Q)."""

    factors: dict[str, Tensor]  # V (n, k) or Q (m, k)
    transposed: bool
    dtype: torch.dtype
    totals: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, X: Tensor, dY: Tensor) -> None:
        """Add the product for one use of a layer in one batch."""
        wide = torch.promote_types(dY.dtype, torch.float32)
        X, dY, factor = X.to(wide), dY.to(wide), self.factors[name].to(wide)
        part = (X.T @ (dY @ factor) if self.transposed else dY.T @ (X @ factor)).to(self.dtype)
        self.totals[name] = self.totals[name].add_(part) if name in self.totals else part

    def take(self, name: str, layer: nn.Module) -> Tensor:
        """Remove and return a layer's sum; zeros if the layer was used only by other processes."""
        if name in self.totals:
            return self.totals.pop(name)
        rows = weight_shape(layer)[1 if self.transposed else 0]
        return self.factors[name].new_zeros(rows, self.factors[name].shape[1], dtype=self.dtype)
