"""Mixtures of experts: which of their layers can be adapted, and which cannot."""

import warnings
from collections.abc import Iterable

from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn


def fused_experts(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights of a mixture of experts that are one tensor (experts, rows, columns) instead of layers."""
    return {name: weight for name, weight in model.named_parameters() if ".experts." in name and weight.dim() == 3}


def names_of_experts(model: nn.Module, endings: Iterable[str]) -> set[str]:
    """Return which of these last parts of layers' names PEFT reads as names of the model's fused experts.

    In models whose experts were linear layers before transformers 5 (DeepSeek, Qwen-MoE, ...), PEFT applies a target
    such as gate_proj to the fused tensors alone. So other layers of that name (a shared expert, a dense first block)
    cannot be adapted, neither here nor by anyone who loads the adapter.
    """
    return {ending for ending in endings if _converted(model, ending)}


def _converted(model: nn.Module, ending: str) -> bool:
    config = LoraConfig(target_modules=[ending])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # one of several names that are a single tensor now
        return True
    return ending not in config.target_modules


def warn_of_experts(base: nn.Module, left_out: Iterable[str]) -> None:
    """Warn of the weights of experts that are not adapted, because they may be most of the model.

    left_out: linear layers whose names are ``names_of_experts``.
    """
    experts, layers = fused_experts(base), list(left_out)
    if not experts and not layers:
        return
    weights = [*experts.values(), *(base.get_submodule(name).weight for name in layers)]
    share = sum(map(nn.Parameter.numel, weights)) / sum(map(nn.Parameter.numel, base.parameters()))
    parts = []
    if experts:
        parts.append(f"{len(experts)} tensors of fused experts (the first is {next(iter(experts))})")
    if layers:
        parts.append(
            f"{len(layers)} linear layers that PEFT takes for experts by their names (the first is {layers[0]})"
        )
    warnings.warn(
        f"not adapted: {' and '.join(parts)}, {share:.0%} of the parameters; only the other linear layers are",
        stacklevel=3,
    )
