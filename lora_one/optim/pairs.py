"""Find the two factors of each LoRA layer."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from lora_one.errors import UsageError


class Pair(NamedTuple):
    """The factors of one layer, A (r, n) and B (m, r), in PEFT's layout, and the layer's scaling s."""

    layer: str  # dotted name
    A: nn.Parameter
    B: nn.Parameter
    scaling: float = 1.0


def lora_pairs(model: nn.Module) -> list[Pair]:
    """Return the trainable pairs of a model, found by the module that contains both factors.

    A module's ``lora_A`` and ``lora_B`` map an adapter's name to a linear layer. Not a pair: factors that are not both
    trainable matrices (frozen factors, with or without an r x r core; convolutions), and all other parameters
    (embeddings, DoRA magnitudes, heads, the weights of full fine-tuning).
    """
    return [pair for pair in _factors(model) if _trains(pair.A) and _trains(pair.B)]


def refuse_half_frozen(model: nn.Module, optimizer: str) -> None:
    """Raise UsageError if only one factor of a layer is trained: an optimizer of pairs needs both gradients."""
    for layer, A, B, _ in _factors(model):
        if _trains(A) != _trains(B):
            one, other = ("lora_A", "lora_B") if _trains(A) else ("lora_B", "lora_A")
            raise UsageError(
                f"{optimizer} computes the steps of B and A from each other's gradients, but in {layer} only {one} is "
                f"trained: train {other} as well, or use another optimizer, such as AdamW"
            )


def _factors(model: nn.Module) -> Iterator[Pair]:
    """Yield the weights of every module with both factors, trainable or not. s is 1 if the module has no scaling.

    Raises UsageError: a module's factors are those of several experts in one matrix, which is no pair.
    """
    for layer, module in model.named_modules():
        down, up = getattr(module, "lora_A", None), getattr(module, "lora_B", None)
        if not (isinstance(down, nn.ModuleDict) and isinstance(up, nn.ModuleDict)):
            continue
        if getattr(module, "num_experts", 1) > 1:
            raise UsageError(
                f"{layer} has the factors of {module.num_experts} fused experts in one matrix, which no optimizer here "
                "steps as pairs: use another optimizer, such as AdamW, or a LoraConfig without target_parameters"
            )
        scaling = getattr(module, "scaling", {})
        for adapter in (name for name in down if name in up):
            A, B = (getattr(side[adapter], "weight", None) for side in (down, up))
            yield Pair(layer, A, B, float(scaling.get(adapter, 1.0)))


def _trains(factor: object) -> bool:
    return isinstance(factor, nn.Parameter) and factor.requires_grad and factor.dim() == 2
