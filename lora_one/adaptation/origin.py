"""How the adapters of a model were initialised: remembered with the model, for saving it without further arguments."""

import warnings
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from peft import PeftModel

from lora_one.adaptation.core_modules import Core
from lora_one.adaptation.layers import ADAPTER, FactorPairs, lora_layers

KEY = "_lora_one_origin"


@dataclass(frozen=True)
class Origin:
    """The initialisation of a model's adapters.

    initial_factors: (B0, A0) of the layers whose base became W - s B0 A0, on the CPU.  title, settings: of the method.
    examples: number of examples that it used.
    """

    initial_factors: FactorPairs = field(default_factory=dict)
    title: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    examples: int = 0


def remember(model: PeftModel, origin: Origin) -> None:
    """Store the origin with the model; if PEFT cannot save this model as it is, let ``save_pretrained`` warn."""
    model.__dict__[KEY] = origin
    model.__dict__["load_adapter"] = partial(load_in_the_same_dtype, model)
    if reason_to_convert(model):
        warn_of_plain_saving(model)


def origin_of(model: PeftModel) -> Origin:
    """Return the stored origin, or an empty one."""
    return model.__dict__.get(KEY, Origin())


def is_wrapped(model: Any) -> bool:
    """Return whether a model has adapters of PEFT."""
    return isinstance(model, PeftModel)


def has_core(model: PeftModel) -> bool:
    """Return whether an r x r core between frozen factors is trained."""
    return any(isinstance(layer.lora_B[ADAPTER], Core) for layer in lora_layers(model).values())


def reason_to_convert(model: PeftModel) -> str | None:
    """Return why PEFT alone does not save this model correctly; None: it does."""
    if origin_of(model).initial_factors:
        return f"{origin_of(model).title} changed the base weights, so these factors are wrong for the original base"
    if has_core(model):
        return f"{origin_of(model).title} trains a core between B and A, which plain PEFT does not know"
    return None


def warn_of_plain_saving(model: PeftModel) -> None:
    """Let ``model.save_pretrained`` warn, if PEFT alone does not save this model correctly."""
    if reason_to_convert(model):
        model.__dict__["save_pretrained"] = partial(save_with_warning, model)


def allow_plain_saving(model: PeftModel) -> None:
    """Let ``model.save_pretrained`` be silent, for checkpoints from which a Trainer resumes."""
    model.__dict__.pop("save_pretrained", None)


def load_in_the_same_dtype(model: PeftModel, *arguments: Any, **options: Any) -> Any:
    """Load an adapter as PEFT does, which converts 16-bit factors to fp32, and convert those of this model back.

    A Trainer calls it to resume, before it creates the optimizer, and to load the best checkpoint.
    """
    before = {name: parameter.dtype for name, parameter in model.named_parameters() if "lora_" in name}
    found = type(model).load_adapter(model, *arguments, **options)
    for name, parameter in model.named_parameters():
        if name in before:
            parameter.data = parameter.data.to(before[name])
    return found


def save_with_warning(model: PeftModel, *arguments: Any, **options: Any) -> None:
    """Save as PEFT does, after a warning."""
    warnings.warn(
        f"model.save_pretrained: {reason_to_convert(model)}. Save with lora_one.save_adapter(model, path), or add "
        "lora_one.AdapterCallback() to your Trainer; both write plain LoRA for the original base",
        stacklevel=2,
    )
    type(model).save_pretrained(model, *arguments, **options)
