"""Adapters in a model: which layers, and how a method's factors get there. The room that knows PEFT."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from lora_one.config import PeftConfig
from lora_one.errors import RunError, UsageError, nearest
from lora_one.gradients import GradientReport, mean_gradients
from lora_one.inits import Method
from lora_one.losses import Batch, Reduction
from lora_one.models import DTYPES
from lora_one.seeding import generator_for
from lora_one.types import AdapterFactors, LayerView

ADAPTER = "default"


@dataclass(frozen=True)
class Probe:
    """The examples a gradient method looks at: collated batches, and how their losses are averaged."""

    batches: Sequence[Batch]
    reduction: Reduction


@dataclass(frozen=True)
class Start:
    """What an initialisation left: the gradient's report (None without one) and a record a layer."""

    gradient: GradientReport | None
    layers: dict[str, dict[str, Any]]


def target_layers(model: nn.Module, peft: PeftConfig) -> dict[str, nn.Linear]:
    """Linear layers to adapt, by dotted name: all but head and embedding, or those with one of the name endings.

    Works on a skeleton too. Raises UsageError: an ending matches no linear layer, or r exceeds a layer.
    """
    head = model.get_output_embeddings()
    linear = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer is not head
    }
    if peft.lora_target_modules != "all":
        chosen = {}
        for ending in peft.lora_target_modules:
            matched = {name: layer for name, layer in linear.items() if name == ending or name.endswith(f".{ending}")}
            if not matched:
                endings = {name.rpartition(".")[2] for name in linear}
                raise UsageError(
                    f"peft.lora_target_modules: {ending} matches no linear layer of this model; "
                    f"{nearest(ending, endings)}"
                )
            chosen |= matched
        linear = {name: layer for name, layer in linear.items() if name in chosen}
    for name, layer in linear.items():
        smallest = min(layer.out_features, layer.in_features)
        if peft.lora_r > smallest:
            raise UsageError(
                f"peft.lora_r={peft.lora_r} exceeds min(m, n)={smallest} of {name} of shape "
                f"{layer.out_features} x {layer.in_features}; lower peft.lora_r or leave this layer out of "
                "peft.lora_target_modules"
            )
    return linear


def scaling_of(peft: PeftConfig) -> float:
    """s = alpha / sqrt(r) with rsLoRA, alpha / r without."""
    return peft.lora_alpha / (peft.lora_r**0.5 if peft.use_rslora else peft.lora_r)


def lora_config(model: nn.Module, peft: PeftConfig) -> LoraConfig:
    """PEFT's configuration of the adapter: plain LoRA, whatever the initialisation, so any PEFT loads it."""
    layers = target_layers(model, peft)
    endings = sorted({name.rpartition(".")[2] for name in layers})
    alike = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in endings}
    return LoraConfig(
        r=peft.lora_r,
        lora_alpha=peft.lora_alpha,
        lora_dropout=peft.lora_dropout,
        use_rslora=peft.use_rslora,
        target_modules=endings if alike == set(layers) else sorted(layers),
        task_type="CAUSAL_LM",
    )


def attach_adapters(
    base: nn.Module, peft: PeftConfig, method: Method, probe: Probe | None, *, seed: int, dtype: str
) -> tuple[PeftModel, Start]:
    """Wrap the base in PEFT and start every adapter at the method's factors.

    Each layer's G goes to the method as soon as it is known and is freed; only the factors stay.
    Raises RunError: a gradient that is zero or not finite (the layer is named).
    """
    layers = target_layers(base, peft)
    factors: dict[str, AdapterFactors] = {}

    def start(name: str, gradient: Tensor | None) -> None:
        view = layer_view(name, layers[name], peft, seed)
        try:
            factors[name] = method.factors(view, gradient)
        except ValueError as error:
            raise RunError(f"init: layer {name}: {error}") from error

    report = None
    if method.needs_gradient:
        try:
            report = mean_gradients(base, layers, probe.batches, probe.reduction, start)
        except ValueError as error:
            raise RunError(f"init: {error}") from error
    else:
        for name in layers:
            start(name, None)
    model = wrap(base, peft, dtype)
    for name, layer in lora_layers(model).items():
        put(layer, factors[name])
    records = {name: layer_record(layers[name], factors[name], scaling_of(peft)) for name in layers}
    return model, Start(report, records)


def wrap(base: nn.Module, peft: PeftConfig, dtype: str) -> PeftModel:
    """The base with adapters of that dtype whose values are still to come."""
    with warnings.catch_warnings():  # PEFT still asks the model by an older name
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        model = get_peft_model(base, lora_config(base, peft), autocast_adapter_dtype=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(DTYPES[dtype])
    return model


def layer_view(name: str, layer: nn.Linear, peft: PeftConfig, seed: int) -> LayerView:
    return LayerView(
        name=name,
        shape=(layer.out_features, layer.in_features),
        weight=partial(_wide_weight, layer),
        rank=peft.lora_r,
        scaling=scaling_of(peft),
        generator=generator_for(seed, f"init of {name}"),
    )


def _wide_weight(layer: nn.Linear) -> Tensor:
    return layer.weight.detach().float()


def lora_layers(model: PeftModel) -> dict[str, Any]:
    """PEFT's LoRA layers by the name of the base layer they wrap."""
    from peft.tuners.lora import LoraLayer

    prefix = "base_model.model."
    return {name.removeprefix(prefix): layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}


@torch.no_grad()
def put(layer: Any, factors: AdapterFactors) -> None:
    """Write factors into a PEFT layer, in its adapter's dtype and on its device."""
    for module, value in ((layer.lora_B[ADAPTER], factors.B), (layer.lora_A[ADAPTER], factors.A)):
        assert module.weight.shape == value.shape, (module.weight.shape, value.shape)
        module.weight.copy_(value)


def layer_record(layer: nn.Linear, factors: AdapterFactors, scaling: float) -> dict[str, Any]:
    """The method's own record and ``relative_shift`` = ||s B A||_F / ||W||_F."""
    # ||B A||_F^2 = tr((B^T B)(A A^T)): r x r products instead of the m x n one
    moved = ((factors.B.T @ factors.B) * (factors.A @ factors.A.T)).sum().clamp(min=0).sqrt()
    shift = scaling * float(moved) / float(layer.weight.float().norm())
    return {**(factors.record or {}), "relative_shift": shift}


def trainable_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
