"""Which layers are adapted, and the parts of PEFT's LoRA layers."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_one.adaptation.core_modules import Core
from lora_one.adaptation.experts import fused_experts, names_of_experts
from lora_one.config.methods import MethodSettings, methods_with
from lora_one.config.schemas import PeftConfig
from lora_one.errors import UsageError, nearest
from lora_one.linalg import full_precision
from lora_one.models import kind_of, text_part, weight_shape
from lora_one.seeding import generator_for
from lora_one.types import AdapterFactors, LayerView

ADAPTER = "default"


FactorPairs = dict[str, tuple[Tensor, Tensor]]


def target_layers(model: nn.Module, peft: PeftConfig, method: MethodSettings | None = None) -> dict[str, nn.Module]:
    """Return the linear layers to adapt, by dotted name: all ``adaptable_layers``, or those with one of the endings.

    model: may be a skeleton.
    Raises UsageError: an ending matches no such layer, or a layer has fewer singular vectors than the method needs.
    """
    layers, confused = adaptable_layers(model)
    if peft.lora_target_modules != "all":
        chosen = set()
        for ending in peft.lora_target_modules:
            matched = {name for name in layers if name == ending or name.endswith(f".{ending}")}
            if not matched:
                raise UsageError(f"peft.lora_target_modules: {_not_matched(model, ending, layers, confused)}")
            chosen |= matched
        layers = {name: layer for name, layer in layers.items() if name in chosen}
    else:  # an output of one number, such as the gate of a shared expert, has no rank to choose
        layers = {name: layer for name, layer in layers.items() if min(weight_shape(layer)) > 1}
    if not layers:
        raise UsageError(
            "peft.lora_target_modules=all finds no linear layer in this model: set it to a list of layer names"
        )
    for name, layer in layers.items():
        refuse_rank(name, layer, peft.lora_r, method)
    return layers


def adaptable_layers(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Return the linear layers that process text, all but head and embedding, and those that PEFT takes for experts.

    Linear layers are torch's, those quantised by bitsandbytes, and GPT-2's Conv1D; for the second group see
    ``experts.names_of_experts``.
    """
    output = model.get_output_embeddings()
    heads = kind_of(model).head_modules
    text = text_part(model)
    linear = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | Conv1D)
        and layer is not output
        and name.partition(".")[0] not in heads
        and name.startswith(text)
    }
    unclear = names_of_experts(model, {name.rpartition(".")[2] for name in linear})
    confused = {name: layer for name, layer in linear.items() if name.rpartition(".")[2] in unclear}
    return {name: layer for name, layer in linear.items() if name not in confused}, confused


def _not_matched(model: nn.Module, ending: str, layers: Iterable[str], confused: Iterable[str]) -> str:
    near = nearest(ending, {name.rpartition(".")[2] for name in layers})
    if any(name.endswith(f".{ending}") for name in fused_experts(model)):
        return f"in this model {ending} is one tensor for all experts, and only linear layers can be adapted; {near}"
    if any(name == ending or name.endswith(f".{ending}") for name in confused):
        return f"in this model PEFT reads {ending} as the name of experts, which are not linear layers; {near}"
    return f"{ending} matches no linear layer of this model; {near}"


def refuse_rank(
    name: str, layer: nn.Module, rank: int, method: MethodSettings | None, section: str = "peft.lora_"
) -> None:
    """Raise UsageError if the layer has fewer singular vectors than the method needs, or the rank is not for it.

    section: prefix, in the message, of the settings r and target_modules.
    """
    vectors = method.vectors if method is not None else 1
    if method is not None:
        method.check_rank(rank, f"{section}r")
    smallest = min(weight_shape(layer))
    if vectors * rank > smallest:
        rule = f"{section}r={rank}" + (f" x {vectors} ({method.title} needs 2 r vectors)" if vectors > 1 else "")
        raise UsageError(
            f"{rule} exceeds the smaller dimension {smallest} of {name}, whose shape is "
            f"{' x '.join(map(str, weight_shape(layer)))}: lower {section}r, or remove this layer from "
            f"{section}target_modules"
        )


def scaling_of(peft: PeftConfig) -> float:
    """Return s: alpha / sqrt(r) with rsLoRA, alpha / r without."""
    return peft.lora_alpha / (peft.lora_r**0.5 if peft.use_rslora else peft.lora_r)


def layer_view(name: str, layer: Any, seed: int, originals: Callable[[str], Tensor] | None = None) -> LayerView:
    """Return what a method can read of one of PEFT's LoRA layers.

    originals: returns the weight of a layer before quantisation, by the layer's name.
    """
    base, rank, scaling = layer.get_base_layer(), layer.r[ADAPTER], layer.scaling[ADAPTER]
    return bare_view(name, base, rank, scaling, seed, partial(originals, name) if originals else None)


def bare_view(
    name: str, base: nn.Module, rank: int, scaling: float, seed: int, original: Callable[[], Tensor] | None = None
) -> LayerView:
    """Return what a method can read of a linear layer that will get an adapter of this rank and scaling."""
    return LayerView(
        name=name,
        shape=weight_shape(base),
        weight=partial(wide_weight, base),
        rank=rank,
        scaling=scaling,
        generator=generator_for(seed, f"init of {name}"),
        original=original,
    )


def wide_weight(layer: nn.Module) -> Tensor:
    """Return W (m, n) in fp32, dequantised if it is quantised."""
    weight = layer.weight.detach()
    if hasattr(weight, "full_tensor"):  # sharded: a collective operation of all processes
        weight = weight.full_tensor()
    if not weight.is_floating_point():
        weight = dequantize_bnb_weight(layer.weight, state=getattr(layer, "state", None))
    return (weight.T if isinstance(layer, Conv1D) else weight).float()


def lora_layers(model: PeftModel) -> dict[str, Any]:
    """Return PEFT's LoRA layers, by the name of the linear layer that they wrap."""
    from peft.tuners.lora import LoraLayer

    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and isinstance(layer.get_base_layer(), nn.Linear | Conv1D)
    }


def plain_layers(model: nn.Module) -> list[Any]:
    """Return the LoRA layers that only multiply their input by A and B: no dropout, DoRA or other variant of PEFT."""
    return [
        layer
        for layer in lora_layers(model).values()
        if not layer.lora_variant and all(isinstance(part, nn.Identity) for part in layer.lora_dropout.values())
    ]


@contextmanager
def inputs_not_cast(layers: Sequence[Any]) -> Iterator[None]:
    """Keep PEFT from casting the inputs of these ``plain_layers``; only for passes under autocast.

    PEFT casts an adapter's bf16 input to fp32, the dtype of A, and autocast casts it back for the product. Without
    both casts the product is the same, and no second copy of the input is stored for the backward pass. Dropout rounds
    differently in bf16, and DoRA computes its norms in the dtype of the input, so those layers keep the casts.
    """
    before = [layer.cast_input_dtype_enabled for layer in layers]
    for layer in layers:
        layer.cast_input_dtype_enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.cast_input_dtype_enabled = enabled


@full_precision()
@torch.no_grad()
def shift_base(model: PeftModel, initial_factors: FactorPairs) -> None:
    """Change W to W - s B0 A0, computed in fp32 and rounded once.

    Raises UsageError: a W is quantised, sharded or used by two modules; no W is changed then.
    """
    layers = lora_layers(model)
    for name in initial_factors:
        refuse_quantised(name, layers[name].get_base_layer())
    refuse_shared(model, initial_factors)
    for name, (B, A) in initial_factors.items():
        layer = layers[name].get_base_layer()
        wide = torch.promote_types(layer.weight.dtype, torch.float32)
        B, A = B.to(layer.weight.device, wide), A.to(layer.weight.device, wide)
        shift = layers[name].scaling[ADAPTER] * B @ A
        layer.weight.copy_(layer.weight.to(wide) - (shift.T if isinstance(layer, Conv1D) else shift))


def refuse_quantised(name: str, layer: nn.Module) -> None:
    """Raise UsageError if the layer's weight is quantised or sharded, so it cannot become W - s B A."""
    kind = "sharded" if hasattr(layer.weight, "full_tensor") else "quantised"
    if kind == "sharded" or not layer.weight.is_floating_point():
        raise UsageError(
            f"the weight of {name} is {kind} ({type(layer).__name__}), but this init changes the base to W - s B A, "
            f"which is not possible for a {kind} W: set {methods_with(reads_weights=False, changes_base=False)}, which "
            f"do not change W, or use a model that is not {kind}"
        )


def refuse_shared(model: PeftModel, names: Iterable[str]) -> None:
    """Raise UsageError if another module uses the weight of one of these layers, because it would be changed, too."""
    layers = lora_layers(model)
    users: dict[int, set[str]] = {}  # of each module and each parameter
    for name, module in model.named_modules():
        for part in (*module._modules.values(), *module._parameters.values()):
            users.setdefault(id(part), set()).add(name)
    for name in names:
        base = layers[name].get_base_layer()
        own = {f"base_model.model.{name}", f"base_model.model.{name}.base_layer"}
        others = (users[id(base)] | users[id(base.weight)]) - own
        if others:
            other = min(others).removeprefix("base_model.model.").removesuffix(".base_layer")
            raise UsageError(
                f"the weight of {name} is also used by {other}, so it cannot become W - s B A, which this init needs: "
                f"remove {name.rpartition('.')[2]} from target_modules (and layer_replication, if it is set), or "
                f"choose {methods_with(changes_base=False)}, which do not change W"
            )


@torch.no_grad()
def put(layer: Any, factors: AdapterFactors) -> None:
    """Write factors into a PEFT layer, in its adapter's dtype and on its device.

    With DoRA (arXiv:2402.09353, eq. 5) the magnitudes become the norms of the rows of W + s B A, so that the layer is
    W + s B A at first, as without DoRA.
    """
    up, down = layer.lora_B[ADAPTER], layer.lora_A[ADAPTER]
    places = [(down.weight, factors.A)]
    if isinstance(up, Core):
        places += [(up.B, factors.B), (up.R, factors.R)]
    else:
        assert factors.R is None, "a core R needs the r x r architecture: peft.lora_xs"
        places.append((up.weight, factors.B))
    for place, value in places:
        assert place.shape == value.shape, (place.shape, value.shape)
        place.copy_(value)
    if ADAPTER in layer.lora_magnitude_vector:
        B, A = (part.weight.float() for part in (up, down))
        moved = torch.addmm(wide_weight(layer.get_base_layer()).to(B.device), B, A, alpha=layer.scaling[ADAPTER])
        layer.lora_magnitude_vector[ADAPTER].weight.copy_(moved.norm(dim=1))


def factors_of(layer: Any) -> AdapterFactors:
    """Return the current factors of a PEFT layer, in its dtype and on its device."""
    up, A = layer.lora_B[ADAPTER], layer.lora_A[ADAPTER].weight.detach()
    if isinstance(up, Core):
        return AdapterFactors(up.B, A, R=up.R.detach())
    return AdapterFactors(up.weight.detach(), A)


def relative_shift(layer: Any, factors: AdapterFactors) -> float:
    """Return ||s B A||_F / ||W||_F, or with a core ||s B R A||_F / ||W||_F; see `relative_change`."""
    B = factors.B if factors.R is None else factors.B @ factors.R
    # ||B A||_F^2 = tr((B^T B)(A A^T)): r x r products instead of the m x n one
    moved = ((B.T @ B) * (factors.A @ factors.A.T)).sum().clamp(min=0).sqrt()
    return relative_change(layer.scaling[ADAPTER] * float(moved), float(wide_weight(layer.get_base_layer()).norm()))


def relative_change(change: float, weight: float) -> float:
    """Return the norm of a change over that of the weight; for a weight of zero, 1, or 0 if nothing changes."""
    return change / weight if weight else float(change > 0)


def trainable_parameters(model: nn.Module) -> int:
    """Return how many parameters of the model are trainable."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
