"""Top singular vectors of mean gradients that are never held: a Krylov space whose products are passes over data.

A pass gives G V (m x k) or Q^T G (k x n) of every layer at once, from dY^T (X V) and (dY Q)^T X, so a block of a
layer's space costs (m + n) x k numbers. The price is a forward and a backward pass over all batches for each product.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lora_one.distributed import Processes
from lora_one.gradients import GradientReport, backward_passes
from lora_one.linalg import KrylovSpace, LowRank, fix_signs
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

    Rounds of two passes go on until no layer's captured energy has more than the tolerance to gain; a layer that
    has settled takes no further part. The energy divides by ||G||^2 as the first sketch estimates it:
    E ||G Omega||^2 = k ||G||^2 for a Gaussian Omega of k columns.
    """
    run = partial(_pass, model, layers, batches, reduction, checkpointing)
    spaces, right, totals = {}, {}, {}
    for name, layer in layers.items():
        spaces[name] = KrylovSpace((layer.out_features, layer.in_features), singular, tolerance)
        start = spaces[name].start(generator_for(seed, f"low-rank step of {name}"))
        right[name] = start.to(layer.weight.device)
    for _ in range(MAX_ROUNDS):
        report, products = run(right, transposed=False)  # G V, (m, k)
        left = {}
        for name, product in products.items():
            if name not in totals:
                totals[name] = float(product.square().sum()) / product.shape[1]
            if totals[name] == 0:
                raise ValueError(f"the gradient of layer {name} is zero: nothing to start from")
            left[name] = spaces[name].add_left(product)
        _, products = run(left, transposed=True)  # G^T Q, (n, k)
        for name, product in products.items():
            spaces[name].add_right(product)
        right = {name: spaces[name].next_right() for name in products if not spaces[name].settled}
        if not right:
            break
    for name in layers:
        U, S, Vh = spaces.pop(name).svd()
        consume(name, fix_signs(LowRank(U, S, Vh, min(1.0, float(S.square().sum()) / totals[name]))))
    return report


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
    """One pass over the batches: G V of each layer with a factor, or with ``transposed`` G^T Q; on every process."""
    layers = {name: layers[name] for name in factors}
    products: dict[str, Tensor] = {}

    def receive(name: str, X: Tensor, dY: Tensor) -> None:
        wide = torch.promote_types(dY.dtype, torch.float32)
        X, dY, factor = X.to(wide), dY.to(wide), factors[name].to(wide)
        part = X.T @ (dY @ factor) if transposed else dY.T @ (X @ factor)
        products[name] = products[name].add_(part) if name in products else part

    report = backward_passes(model, layers, batches, reduction, receive, checkpointing=checkpointing)
    processes = Processes.current()
    for name in factors:
        if name not in products:
            raise ValueError(f"layer {name} got no gradient: it takes no part in the loss")
        processes.sum(products[name])
    return report, products
