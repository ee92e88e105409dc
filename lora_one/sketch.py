"""Top singular vectors of mean gradients that are never held: subspace iteration whose products are passes over data.

A pass gives G Omega (m x k) or Q^T G (k x n) of every layer at once, from dY^T (X Omega) and (dY Q)^T X, so a layer
costs (m + n) x k numbers. The price is a forward and a backward pass over all batches for each product.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lora_one.distributed import Processes
from lora_one.gradients import GradientReport, backward_passes, refuse_unused, sum_dtype, weight_shape, wide_dtype
from lora_one.linalg import LowRank, fix_signs, nothing_to_gain
from lora_one.losses import Batch, Reduction
from lora_one.seeding import generator_for

OVERSAMPLING = 24  # a pass over the data costs more than the columns
MAX_ROUNDS = 12  # of two passes each
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

    Rounds of two passes go on until no layer's captured energy has more than the tolerance to gain.

    The energy divides by ||G||^2 = ||Q^T G||^2 + ||(I - Q Q^T) G||^2 with Q the ``singular_of`` + 24 columns found. The
    first term is known; the second is estimated without bias (Hutch++, arXiv:2010.09649) as ||(I - Q Q^T) G Psi||^2
    / 8 with 8 Gaussian columns Psi that Q does not depend on. So only the share of G outside of Q is uncertain, by
    half of itself in one standard deviation at most (all of it in one direction), and by less the more it is spread.

    Raises ValueError, on every process: as ``backward_passes``; a layer took no part in the loss, or its gradient is
    zero or not finite (named).
    """
    run = partial(_pass, model, layers, batches, reduction, checkpointing)
    right = {name: _omega(name, layer, singular_of(name), seed) for name, layer in layers.items()}
    columns = {name: omega.shape[1] - PROBES for name, omega in right.items()}
    aside: dict[str, Tensor] = {}  # G Psi
    energies: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(MAX_ROUNDS):
        report, left = run(right, transposed=False)  # G V, (m, k)
        for name, product in left.items():
            if not product.any():
                raise ValueError(f"the gradient of layer {name} is zero: nothing to start from")
            if not torch.isfinite(product).all():
                raise ValueError(f"layer {name}: its gradient holds entries that are not finite")
            aside.setdefault(name, product[:, columns[name] :].clone())
            left[name] = torch.linalg.qr(product[:, : columns[name]]).Q
        _, products = run(left, transposed=True)  # G^T Q, (n, k)
        for name, product in products.items():
            values = torch.linalg.svdvals(product)[: singular_of(name)]
            energies[name].append(float(values.square().sum()))
        if all(nothing_to_gain(history, tolerance) for history in energies.values()):
            break
        right = {name: torch.linalg.qr(product).Q for name, product in products.items()}
    for name in layers:
        U, S, Vh = torch.linalg.svd(products[name].T, full_matrices=False)  # Q^T G
        Q, outside = left[name], aside[name] - left[name] @ (left[name].T @ aside[name])
        total = S.square().sum() + outside.square().sum() / PROBES
        kept = slice(0, singular_of(name))
        consume(name, fix_signs(LowRank(Q @ U[:, kept], S[kept], Vh[kept], float(S[kept].square().sum() / total))))
    return report


def _omega(name: str, layer: nn.Module, rank: int, seed: int) -> Tensor:
    """Gaussian columns: those to iterate on, then ``PROBES``."""
    m, n = weight_shape(layer)
    generator = generator_for(seed, f"low-rank step of {name}")
    columns = min(rank + OVERSAMPLING, m, n)
    return torch.randn(n, columns + PROBES, generator=generator).to(layer.weight.device)


def _pass(
    model: nn.Module,
    layers: dict[str, nn.Module],
    batches: Sequence[Batch],
    reduction: Reduction,
    checkpointing: bool,
    factors: dict[str, Tensor],
    *,
    transposed: bool,
) -> tuple[GradientReport, dict[str, Tensor]]:
    """One pass over the batches: G V of every layer, or with ``transposed`` G^T Q; the same on every process."""
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
    return report, products
