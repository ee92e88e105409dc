"""The mean gradient of the loss in the target layers' weights, without asking any weight for a gradient.

For y = x W^T the gradient is G = dY^T X, summed over positions, so a layer's input and the gradient of its
output are enough: weights stay frozen, and may be quantised.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_one.losses import Batch, Reduction, loss_count, loss_sum, model_logits


@dataclass(frozen=True)
class GradientReport:
    """examples and tokens (that count in the loss) behind a mean gradient, and the loss there."""

    examples: int
    tokens: int
    loss: float


def mean_gradients(
    model: nn.Module,
    layers: dict[str, nn.Module],
    batches: Sequence[Batch],
    reduction: Reduction,
    consume: Callable[[str, Tensor], None],
) -> GradientReport:
    """Hand G (m, n) of each layer to ``consume(name, G)`` and free it; fp32 on the layer's device.

    G is the gradient of the mean loss over all batches (``reduction``: mean over examples of their mean-token
    losses, or over tokens), dropout off, so it depends on no batch size and no padding. The product dY^T X and
    the sum over batches are taken in fp32 (fp64 for an fp64 model) whatever the model's dtype.

    Raises ValueError: the loss is not finite, or a layer took no part in it (named).
    """
    count = sum(loss_count(batch["labels"], reduction) for batch in batches)
    totals: dict[str, Tensor] = {}
    loss = 0.0
    was_training = model.training
    model.eval()
    try:
        with _accumulating(layers, totals), _embedding_outputs_need_gradients(model):
            for batch in batches:
                with torch.enable_grad():
                    logits = model_logits(model, batch)
                    share = loss_sum(logits, batch["labels"].to(logits.device), reduction) / count
                if not torch.isfinite(share):
                    raise ValueError(f"the loss on the initialisation examples is {share.item()}")
                share.backward()
                loss += share.item()
    finally:
        model.train(was_training)
    for name in layers:
        if name not in totals:
            raise ValueError(f"layer {name} got no gradient: it takes no part in the loss")
        consume(name, totals.pop(name))
    examples = sum(len(batch["labels"]) for batch in batches)
    tokens = sum(loss_count(batch["labels"], "token") for batch in batches)
    return GradientReport(examples, tokens, loss)


@contextmanager
def _accumulating(layers: dict[str, nn.Module], totals: dict[str, Tensor]) -> Iterator[None]:
    """While open, every backward pass adds dY^T X of each layer's calls to ``totals``."""

    def watch(name: str) -> Callable[..., None]:
        def on_forward(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad:  # a pass without gradients, such as the first under checkpointing
                return
            X = inputs[0].detach()

            def on_backward(dY: Tensor) -> None:
                wide = torch.float64 if dY.dtype == torch.float64 else torch.float32
                G = dY.reshape(-1, dY.shape[-1]).to(wide).T @ X.reshape(-1, X.shape[-1]).to(wide)  # (m, n)
                totals[name] = totals[name].add_(G) if name in totals else G

            output.register_hook(on_backward)

        return on_forward

    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _embedding_outputs_need_gradients(model: nn.Module) -> Iterator[None]:
    """With every weight frozen, autograd starts at the embeddings' output."""
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    handle = model.get_input_embeddings().register_forward_hook(
        lambda _module, _inputs, output: output.requires_grad_(True) if torch.is_grad_enabled() else None
    )
    try:
        yield
    finally:
        handle.remove()
        for parameter in frozen:
            parameter.requires_grad_(True)
