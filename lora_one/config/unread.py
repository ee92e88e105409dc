"""Keys that are valid, but that a run does not read with its other settings."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_one.config import RunConfig

OF_ADAPTERS = ("lora_alpha", "lora_dropout", "use_rslora", "loraplus_lr_ratio", "train_embeddings")
OF_LAYERS = ("lora_r", "lora_target_modules")  # also read by a method that steps the weights of these layers


def unread(run: "RunConfig") -> dict[str, str]:
    """Return keys of ``peft`` and ``model`` whose values change nothing in this run, and why.

    They are not refused, so that the methods of a comparison can share them. A key that a choice of a group does not
    have at all is refused as unknown.
    """
    peft, optimizer = run.peft, run.optimizer.name
    keys: dict[str, str] = {}
    if not run.optimizer.preconditioned:
        keys["model.prec_reg"] = f"optimizer={optimizer} has no preconditioners"
    if not peft.use_loraplus:
        keys["peft.loraplus_lr_ratio"] = f"peft.use_loraplus={peft.use_loraplus} uses one learning rate"
    if peft.lora_relative_r is not None:
        keys["peft.lora_r"] = f"peft.lora_relative_r={peft.lora_relative_r:g} sets the rank"
    if peft.adalora:
        keys["peft.use_rslora"] = "AdaLoRA (peft.adalora=True) has its own scaling"
    if run.init.unit_scaling and run.init.trains_core:
        keys |= dict.fromkeys(("peft.lora_alpha", "peft.use_rslora"), f"{run.init.title} uses the scaling s = 1")
    if not peft.use_peft:
        names = OF_ADAPTERS if run.init.steps_weights else (*OF_ADAPTERS, *OF_LAYERS)
        keys |= dict.fromkeys((f"peft.{name}" for name in names), "peft.use_peft=False trains every weight")
    return keys


def notes(run: "RunConfig", given: Iterable[str]) -> list[str]:
    """Return a sentence for each reason why some of these keys change nothing in a run.

    given: keys of the command line, also of other groups.
    """
    found = unread(run)
    reasons: dict[str, list[str]] = {}
    for key in given:
        if key in found:
            reasons.setdefault(found[key], []).append(key)
    return [f"this run does not read {', '.join(keys)}: {why}" for why, keys in reasons.items()]
