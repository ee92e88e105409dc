"""Which parameters are the two factors of one LoRA layer."""

from typing import NamedTuple

from torch import nn


class Pair(NamedTuple):
    """The factors of one layer, A (r, n) and B (m, r), as PEFT holds them."""

    layer: str  # dotted name
    A: nn.Parameter
    B: nn.Parameter


def lora_pairs(model: nn.Module) -> list[Pair]:
    """The pairs that train, found by the module that holds both, never by the position of a parameter.

    A module's ``lora_A`` and ``lora_B`` are mappings from an adapter's name to a linear map. No pair: factors that are
    no trainable matrices (one of them frozen, an r x r core between frozen ones, convolutions), and whatever is no
    such module (embeddings, DoRA magnitudes, heads, the weights of full fine-tuning).
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
