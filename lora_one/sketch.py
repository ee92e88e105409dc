"""Top singular vectors of mean gradients that are never held: subspace iteration whose products are passes over data.

A pass gives G Omega (m x k) or Q^T G (k x n) of every layer at once, from dY^T (X Omega) and (dY Q)^T X, so a layer
costs (m + n) x k numbers. The price is a forward and a backward pass over all batches for each product.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lora_one.distributed import Processes
from lora_one.gradients import GradientReport, backward_passes
from lora_one.linalg import OVERSAMPLING, LowRank, fix_signs, nothing_to_gain
from lora_one.losses import Batch, Reduction
from lora_one.seeding import generator_for

MAX_ROUNDS = 12  # of two passes each


def sketched_steps(
    model: nn.Module,
    layers: dict[str, nn.Module],
    batches: Sequence[Batch],
    reduction: Reduction,
    consume: Callable[[str, LowRank], None],
    *,
    singular: int,
    tolerance: float,
    seed: int,
    checkpointing: bool = False,
) -> GradientReport:
    """Hand the leading ``singular`` singular values and vectors of each layer's gradient to ``consume``.

    Rounds of two passes go on until no layer's captured energy has more than the tolerance to gain. The energy
    divides by ||G||^2 as the first sketch estimates it: E ||G Omega||^2 = k ||G||^2 for a Gaussian Omega of k columns.
    """
    run = partial(_pass, model, layers, batches, reduction, checkpointing)
    right = {name: _omega(name, layer, singular, seed) for name, layer in layers.items()}
    columns = {name: omega.shape[1] for name, omega in right.items()}
    totals: dict[str, float] = {}
    energies: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(MAX_ROUNDS):
        report, left = run(right, transposed=False)  # G V, (m, k)
        for name, product in left.items():
            if not product.any():
                raise ValueError(f"the gradient of layer {name} is zero: nothing to start from")
            totals.setdefault(name, float(product.square().sum()) / columns[name])
            left[name] = torch.linalg.qr(product).Q
        _, products = run(left, transposed=True)  # G^T Q, (n, k)
        for name, product in products.items():
            values = torch.linalg.svdvals(product)[:singular]
            energies[name].append(float(values.square().sum()))
        if all(nothing_to_gain(history, tolerance) for history in energies.values()):
            break
        right = {name: torch.linalg.qr(product).Q for name, product in products.items()}
    for name in layers:
        U, S, Vh = torch.linalg.svd(products[name].T, full_matrices=False)  # Q^T G
        kept = slice(0, singular)
        step = LowRank(left[name] @ U[:, kept], S[kept], Vh[kept], min(1.0, energies[name][-1] / totals[name]))
        consume(name, fix_signs(step))
    return report


def _omega(name: str, layer: nn.Module, rank: int, seed: int) -> Tensor:
    smallest = min(layer.out_features, layer.in_features)
    generator = generator_for(seed, f"low-rank step of {name}")
    sketch = torch.randn(layer.in_features, min(rank + OVERSAMPLING, smallest), generator=generator)
    return sketch.to(layer.weight.device)


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

    def receive(name: str, X: Tensor, dY: Tensor) -> None:
        wide = torch.promote_types(dY.dtype, torch.float32)
        X, dY, factor = X.to(wide), dY.to(wide), factors[name].to(wide)
        part = X.T @ (dY @ factor) if transposed else dY.T @ (X @ factor)
        products[name] = products[name].add_(part) if name in products else part

    report = backward_passes(model, layers, batches, reduction, receive, checkpointing=checkpointing)
    processes = Processes.current()
    for name in layers:
        if name not in products:
            raise ValueError(f"layer {name} got no gradient: it takes no part in the loss")
        processes.sum(products[name])
    return report, products
