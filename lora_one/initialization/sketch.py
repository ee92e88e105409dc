"""Low-rank steps of mean gradients that are never whole in memory: a block Krylov space whose products are passes.

A pass over the batches gives G V (m x k), or G^T Q (n x k), of every layer at once, from dY^T (X V) and X^T (dY Q). A
layer needs (m + n) x k numbers for each block; each product costs a forward and a backward pass over all batches.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lora_one.distributed import Processes
from lora_one.initialization.backward import GradientReport, backward_passes
from lora_one.initialization.gradients import refuse_unused, sum_dtype, wide_dtype
from lora_one.linalg import KrylovSpace, LowRank, fix_signs
from lora_one.losses import Batch, Reduction
from lora_one.models import weight_shape
from lora_one.seeding import generator_for

PROBES = 8  # random columns of the first pass that only tell how much of G lies outside the subspace found


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
    """Hand the leading ``singular_of(name)`` singular values and vectors of each layer's gradient to ``consume``.

    A layer's space, its random numbers and its stopping rule are those of ``truncated_svd`` on the whole gradient, so
    the two agree up to rounding. Passes go on until the last layer's space has settled; settled layers take no part.

    The energy divides by ||G||^2 = ||Q^T G||^2 + ||(I - Q Q^T) G||^2 with Q all left columns. The first term is known;
    the second is estimated without bias (Hutch++, arXiv:2010.09649) as ||(I - Q Q^T) G Psi||^2 / 8 with 8 Gaussian
    columns Psi that Q does not depend on. So only the share of G outside of Q is uncertain, by half of itself in one
    standard deviation at most (all of it in one direction), and by less the more it is spread.

    Raises ValueError, on every process: as ``backward_passes``; a layer took no part in the loss, or its gradient is
    zero or not finite (named).
    """
    run = partial(_pass, model, reduction=reduction, batches=batches, checkpointing=checkpointing)
    spaces = {name: KrylovSpace(weight_shape(layer), singular_of(name), tolerance) for name, layer in layers.items()}
    right = {name: _omega(name, layers[name], space, seed) for name, space in spaces.items()}
    report, products = run(layers, right, transposed=False)  # G [Omega, Psi]
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
        _, products = run({name: layers[name] for name in left}, left, transposed=True)  # G^T Q
        right = {name: spaces[name].add_right(product) for name, product in products.items()}
        right = {name: P for name, P in right.items() if not spaces[name].settled}
        if not right:
            break
        _, products = run({name: layers[name] for name in right}, right, transposed=False)  # G P
    for name in layers:
        space = spaces.pop(name)
        U, S, Vh = space.svd()
        outside = aside[name] - space.Q @ (space.Q.T @ aside[name])
        total = float(space.T.square().sum() + outside.square().sum().cpu() / PROBES)
        energy = min(1.0, float(S.double().square().sum()) / total)
        consume(name, fix_signs(LowRank(U, S, Vh, energy)))
    return report


def _refuse_unusable(name: str, product: Tensor) -> None:
    """Raise ValueError when a product with random columns shows that the gradient is zero or not finite."""
    if not product.any():
        raise ValueError(f"the gradient of layer {name} is zero: nothing to start from")
    if not torch.isfinite(product).all():
        raise ValueError(f"layer {name}: its gradient holds entries that are not finite")


def _omega(name: str, layer: nn.Module, space: KrylovSpace, seed: int) -> Tensor:
    """Return Gaussian columns: those of the space, then ``PROBES``."""
    generator = generator_for(seed, f"low-rank step of {name}")
    psi = torch.randn(weight_shape(layer)[1], PROBES, generator=generator_for(seed, f"energy of {name}"))
    return torch.cat([space.start(generator), psi], dim=1).to(layer.weight.device)


def _pass(
    model: nn.Module,
    layers: dict[str, nn.Module],
    factors: dict[str, Tensor],
    *,
    batches: Sequence[Batch],
    reduction: Reduction,
    checkpointing: bool,
    transposed: bool,
) -> tuple[GradientReport, dict[str, Tensor]]:
    """Return G V of every layer, or with ``transposed`` G^T Q, by one pass; the same on every process."""
    products: dict[str, Tensor] = {}
    sums = sum_dtype(model, layers)

    def receive(name: str, X: Tensor, dY: Tensor) -> None:
        wide = torch.promote_types(dY.dtype, torch.float32)
        X, dY, factor = X.to(wide), dY.to(wide), factors[name].to(wide)
        part = (X.T @ (dY @ factor) if transposed else dY.T @ (X @ factor)).to(sums)
        products[name] = products[name].add_(part) if name in products else part

    report = backward_passes(model, layers, batches, reduction, receive, checkpointing=checkpointing)
    refuse_unused(layers, products.keys())
    processes = Processes.current()
    for name, layer in layers.items():
        if name not in products:  # it took part on other processes only
            rows = weight_shape(layer)[1 if transposed else 0]
            products[name] = factors[name].new_zeros(rows, factors[name].shape[1], dtype=sums)
        products[name] = processes.sum(products[name]).to(wide_dtype(model))
    return report, {name: products[name] for name in layers}  # in one order on every process
