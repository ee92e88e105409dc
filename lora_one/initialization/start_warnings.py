"""Does a start harm the model? Warnings for the screen and run.json, an error where a loss is not finite."""

import math
from collections.abc import Mapping
from typing import Any

from lora_one.config.schemas import GradientInit, PeftInit, SvdInit
from lora_one.errors import RunError

RISE = 1e-3  # of the loss before: less is rounding of a 16-bit base


def start_warnings(init: Any, record: Mapping[str, Any]) -> list[str]:
    """Return one sentence where the start raised the loss on its examples or took a step that was too large.

    A step is too large where its first-order decrease exceeds the loss itself: no model can lose more. A scale that
    was searched for is judged by the measured loss alone.
    record: ``init`` of run.json (method, examples, loss_before, loss_after, predicted_decrease, searched).
    """
    before, after, predicted = (record[key] for key in ("loss_before", "loss_after", "predicted_decrease"))
    if before is None or after is None:
        return []
    if after > before * (1 + RISE):
        return [
            f"the start of {record['method']} raised the loss on its {record['examples']} examples from {before:.4f} "
            f"to {after:.4f}: {remedy(init)}"
        ]
    if predicted is not None and predicted > before and not record["searched"]:
        return [
            f"the start of {record['method']} goes beyond the range in which the first order holds: it predicts a "
            f"decrease by {predicted:.4f}, more than the loss itself ({before:.4f} before, {after:.4f} after). "
            f"To choose the scale by the measured loss, {remedy(init)}"
        ]
    return []


def refuse_not_finite(init: Any, method: str, figures: Mapping[str, float | None]) -> None:
    """Raise RunError where a figure of the start is NaN or infinite (named)."""
    for name, value in figures.items():
        if value is not None and not math.isfinite(value):
            raise RunError(f"the {name} is {value} after the start of {method}: {remedy(init)}")


def remedy(init: Any) -> str:
    """Say which key makes the start smaller."""
    if isinstance(init, GradientInit) and init.direction == "LoRA-SB":
        return f"lower init.eta (now {init.eta:g})"
    if isinstance(init, GradientInit) and init.scale == "search":
        return "look at more examples (init.iters) or set init.stable_gamma to a large number"
    if isinstance(init, GradientInit) and init.direction == "LoRA-One":
        if init.scale == "stable":
            return f"leave out init.stable_gamma (the scale is then searched for), or raise it (now {init.gamma:g})"
        return f"leave out init.scale={init.scale} (the scale is then searched for), or give a large init.stable_gamma"
    if isinstance(init, GradientInit | SvdInit) and init.scale == "stable":
        return f"raise init.stable_gamma (now {init.gamma:g}), or set model.bf16=false where the base is in 16 bits"
    if isinstance(init, GradientInit | SvdInit | PeftInit):
        return "set model.bf16=false: a base in 16 bits rounds W - s B A"
    return "lower init.lora_A_std and init.lora_B_std, or take init=default"
