"""The curvature of the loss at the start: the largest eigenvalue of its Hessian in what the adapters train."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lora_one.distributed import Processes
from lora_one.errors import UsageError
from lora_one.initialization.lanczos import Eigenvalue, largest_eigenvalue
from lora_one.linalg import full_precision
from lora_one.losses import Batch, Reduction, batch_count, batch_loss, evaluating
from lora_one.progress import progress
from lora_one.seeding import generator_for

TOLERANCE = 0.01  # relative error of an eigenvalue
LIMIT = 100  # products with the Hessian


def largest_curvature(model: nn.Module, batches: Sequence[Batch], reduction: Reduction, seed: int) -> Eigenvalue:
    """Return the largest eigenvalue of the Hessian of the mean loss, to 1 % unless 100 products do not suffice.

    The Hessian is that in all trained parameters of the adapters together, without dropout. Gradient descent on a
    quadratic with this eigenvalue diverges for learning rates above 2 / lambda.
    Raises ValueError: the loss, and so the eigenvalue, is not finite.
    """
    return _largest(model, adapter_parameters(model), batches, reduction, seed, "all layers")


def curvature_by_layer(
    model: nn.Module, batches: Sequence[Batch], reduction: Reduction, seed: int
) -> dict[str, Eigenvalue]:
    """Return the largest eigenvalue of the Hessian in the factors of each layer alone, by the name of the layer.

    As in arXiv:2602.04998, but with the scaling s of the adapters and with a relative tolerance.
    """
    layers: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in adapter_parameters(model).items():
        layers.setdefault(name.partition(".lora_")[0], {})[name] = parameter
    found = {}
    with progress("curvature", len(layers), "layers") as shown:
        for layer, parameters in layers.items():
            found[layer.removeprefix("base_model.model.")] = _largest(
                model, parameters, batches, reduction, seed, layer
            )
            shown.advance()
    return found


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters of the adapters; not those of a classification head or of embeddings."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad and ".lora_" in name}


def _largest(
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    batches: Sequence[Batch],
    reduction: Reduction,
    seed: int,
    purpose: str,
) -> Eigenvalue:
    sizes = [parameter.numel() for parameter in parameters.values()]
    device = next(iter(parameters.values())).device
    start = torch.randn(sum(sizes), generator=generator_for(seed, f"curvature of {purpose}")).to(device)
    frozen = {p: p.requires_grad for p in model.parameters()}
    chosen = set(map(id, parameters.values()))
    product = hessian_product(model, list(parameters.values()), batches, reduction)
    try:
        for parameter in frozen:
            parameter.requires_grad_(id(parameter) in chosen)
        with twice_differentiable(model):
            return largest_eigenvalue(product, start, tolerance=TOLERANCE, limit=LIMIT)
    finally:
        for parameter, before in frozen.items():
            parameter.requires_grad_(before)


@contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Return a context in which the model's attention is torch's, if it is neither that nor written out.

    The backward passes of other kernels, such as flash_attention_2, are constants to autograd: without an error, the
    second derivatives through attention would be missing.
    Raises UsageError: the model cannot change its attention.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = getattr(getattr(base, "config", None), "_attn_implementation", None)
    if before in (None, "eager", "sdpa"):
        yield
        return
    base.set_attn_implementation("sdpa")
    if base.config._attn_implementation != "sdpa":  # transformers has only warned
        raise UsageError(
            f"wandb.curvature_examples needs second derivatives, which attention by {before} does not have, and this "
            "model cannot change its attention: set wandb.curvature_examples=0, or uninstall flash-attn"
        )
    try:
        yield
    finally:
        base.set_attn_implementation(before)


def hessian_product(
    model: nn.Module, parameters: Sequence[nn.Parameter], batches: Sequence[Batch], reduction: Reduction
) -> Callable[[Tensor], Tensor]:
    """Return the function v -> H v with the Hessian H of the mean loss in these parameters, flattened and joined.

    A product takes two backward passes over every batch. Several processes share the batches and get the same result.
    """
    processes = Processes.current()
    count = sum(batch_count(batch, reduction) for batch in batches)
    shapes = [parameter.shape for parameter in parameters]
    sizes = [parameter.numel() for parameter in parameters]

    def product(vector: Tensor) -> Tensor:
        parts = [part.view(shape) for part, shape in zip(vector.split(sizes), shapes, strict=True)]
        total = torch.zeros_like(vector)
        # other kernels of attention have no second derivative
        with evaluating(model), torch.enable_grad(), full_precision(), sdpa_kernel(SDPBackend.MATH):
            for batch, weight in processes.share(batches):
                loss = batch_loss(model, batch, reduction)[0] * (weight / count)
                if not loss.requires_grad:  # none of these parameters takes part in this batch
                    continue
                first = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
                along = sum((g * part.to(g)).sum() for g, part in zip(first, parts, strict=True))
                if not along.requires_grad:
                    continue
                second = torch.autograd.grad(along, parameters, materialize_grads=True)
                total += torch.cat([part.detach().reshape(-1) for part in second]).to(total)
        return processes.sum(total)

    return product
