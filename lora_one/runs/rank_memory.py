"""The memory of one process of a run: formulas of what the code allocates on its device."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_one.initialization.backward import blocks_of
from lora_one.initialization.forward_batches import MAX_LOGITS, MAX_TOKENS
from lora_one.initialization.holding import SKETCH_PASSES, Place
from lora_one.initialization.sketch import PROBES
from lora_one.linalg import OVERSAMPLING
from lora_one.runs.traffic import Shapes

LOSS = 12  # bytes for each logit in the backward pass: its log-probability and two gradients, fp32
SENT_AT_ONCE = 250 * 2**20  # bytes of weights that DDP copies into one buffer before the first step
IN_USE = 2  # parts of a sharded base that are gathered at once: the one in use, and the buffer of the next
QUANTISED = {"nf4": 0.5 + 4 / 64, "int8": 1.0}  # bytes for each weight; nf4 has an fp32 scale for each 64 weights


def stored_bytes(skeleton: nn.Module, dtype: torch.dtype, quantization: str | None) -> float:
    """Return the bytes of a whole base. If it is quantised, embeddings, norms and the output layer keep the dtype."""
    parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    if quantization is None:
        return dtype.itemsize * parameters
    quantised = sum(layer.weight.numel() for layer in matrices(skeleton, with_output=False))
    return QUANTISED[quantization] * quantised + dtype.itemsize * (parameters - quantised)


def matrices(skeleton: nn.Module, *, with_output: bool = True) -> list[nn.Module]:
    """Return the linear layers of a model, with or without the one that computes the logits."""
    output = None if with_output else skeleton.get_output_embeddings()
    return [part for part in skeleton.modules() if isinstance(part, nn.Linear | Conv1D) and part is not output]


def multiplied(skeleton: nn.Module) -> int:
    """Return how many weights each token is multiplied by: those of all linear layers."""
    return sum(layer.weight.numel() for layer in matrices(skeleton))


def gathered_bytes(skeleton: nn.Module, dtype: torch.dtype) -> int:
    """Return the bytes of the parts that a sharded base has gathered at once: blocks, or the embeddings."""
    parts = [*blocks_of(skeleton), skeleton.get_input_embeddings()]
    return IN_USE * dtype.itemsize * max(sum(weight.numel() for weight in part.parameters()) for part in parts)


def dequantised_bytes(skeleton: nn.Module, dtype: torch.dtype) -> int:
    """Return the bytes of the largest layer of a quantised base in the dtype of the products, in which it is used."""
    return dtype.itemsize * max(layer.weight.numel() for layer in matrices(skeleton, with_output=False))


def dropout_bytes(shapes: Shapes, tokens: int, dtype: torch.dtype) -> int:
    """Return what dropout keeps for the backward pass: the mask of each adapter's input, and the input without it."""
    return (1 + dtype.itemsize) * tokens * sum(n for _, n in shapes)


def held_bytes(
    place: Place, shapes: Shapes, singular: int, itemsize: int, room: float | None = None
) -> tuple[float, float]:
    """Return what an initialisation holds on the device besides base and activations: sums over batches, and the rest.

    place, room: see ``holding.Holding``.  singular: singular vectors of a layer.  itemsize: of the sums.
    """
    sizes = [m * n for m, n in shapes]
    product = 4 * max(sizes)  # of one layer, fp32, before it is added to a sum or moved to the CPU
    if place in ("layer", "cpu"):
        return 0, product
    if place == "device":
        sums = itemsize * sum(sizes)
        return sums if room is None else min(sums, max(room, itemsize * max(sizes))), product
    left, right = sum(m for m, _ in shapes), sum(n for _, n in shapes)
    width, blocks = singular + OVERSAMPLING, SKETCH_PASSES // 2
    spaces = 4 * (width * ((blocks + 1) * left + blocks * right) + PROBES * left)
    block = width * max(left, right)  # the last one, and its product with the gradient
    return itemsize * block, spaces + 4 * block


def forward_rows(examples: int, length: int, outputs: int, processes: int) -> int:
    """Return the examples in a batch of ``forward_batches``, which is passed without gradients. outputs: logits."""
    by_logits = MAX_LOGITS // (4 * outputs * length) if outputs else examples
    return max(1, min(-(-examples // processes), MAX_TOKENS // length, by_logits))
