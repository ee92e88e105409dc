"""The memory of activations, measured: what the forward pass of the largest batch keeps for its backward pass."""

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lora_one.initialization.backward import Taps, prepared
from lora_one.losses import Batch, Reduction, batch_loss


def activations_of(
    model: nn.Module,
    layers: dict[str, nn.Module],
    batches: Sequence[Batch],
    reduction: Reduction,
    *,
    checkpointing: bool,
) -> int:
    """Return the bytes that the forward pass of the largest batch keeps on the device, without weights and buffers.

    Every process has to call it. Without a GPU, the weights that a sharded base gathers for the pass are counted too.
    """
    largest = max(batches, key=lambda batch: batch["input_ids"].numel())
    device = next(iter(layers.values())).weight.device
    taps = Taps(lambda name, X, dY: None, Counter())
    with prepared(model, layers, taps, checkpointing=checkpointing), torch.enable_grad():
        if device.type == "cuda":
            before = torch.cuda.memory_allocated(device)
            loss = batch_loss(model, largest, reduction)  # refers to all that is kept
            kept = torch.cuda.memory_allocated(device) - before
            del loss
            return max(0, kept)
        return saved_bytes(model, lambda: batch_loss(model, largest, reduction))


def saved_bytes(model: nn.Module, forward: Callable[[], object]) -> int:
    """Return the bytes of the tensors that autograd saves in a forward pass, without the model's own."""
    own = {storage_of(tensor)._cdata for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}  # the reference prevents that its address is used again

    def save(tensor: Tensor) -> Tensor:
        storage = storage_of(tensor)
        if storage._cdata not in own:
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in saved.values())


def storage_of(tensor: Tensor) -> torch.UntypedStorage:
    """Return the storage of a tensor, or of this process's part of it."""
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).untyped_storage()
