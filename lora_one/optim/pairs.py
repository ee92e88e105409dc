"""Find the two factors of each LoRA layer."""

from typing import NamedTuple

from torch import nn


class Pair(NamedTuple):
    """The factors of one layer, A (r, n) and B (m, r), in PEFT's layout."""

    layer: str  # dotted name
    A: nn.Parameter
    B: nn.Parameter


def lora_pairs(model: nn.Module) -> list[Pair]:
    """Return the trainable pairs of a model, found by the module that contains both factors.

    A module's ``lora_A`` and ``lora_B`` map an adapter's name to a linear layer. Not a pair: factors that are not both
    trainable matrices (frozen factors, with or without an r x r core; convolutions), and all other parameters
    (embeddings, DoRA magnitudes, heads, the weights of full fine-tuning).
    """
    pairs = []
    for layer, module in model.named_modules():
        down, up = getattr(module, "lora_A", None), getattr(module, "lora_B", None)
        if not (isinstance(down, nn.ModuleDict) and isinstance(up, nn.ModuleDict)):
            continue
        for adapter in (name for name in down if name in up):
            A, B = (getattr(side[adapter], "weight", None) for side in (down, up))
            if _trains(A) and _trains(B):
                pairs.append(Pair(layer, A, B))
    return pairs


def _trains(factor: object) -> bool:
    return isinstance(factor, nn.Parameter) and factor.requires_grad and factor.dim() == 2
