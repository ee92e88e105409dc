"""Does a start harm the model? Warnings for the screen and run.json, an error where a loss is not finite."""

import math
from collections.abc import Mapping
from typing import Any

from lora_one.config.methods import MethodSettings
from lora_one.errors import RunError

RISE = 1e-3  # of the loss before: less is rounding of a 16-bit base


def start_warnings(init: MethodSettings, record: Mapping[str, Any]) -> list[str]:
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
            f"to {after:.4f}: {init.remedy()}"
        ]
    if predicted is not None and predicted > before and not record["searched"]:
        return [
            f"the start of {record['method']} goes beyond the range in which the first order holds: it predicts a "
            f"decrease by {predicted:.4f}, more than the loss itself ({before:.4f} before, {after:.4f} after). "
            f"To choose the scale by the measured loss, {init.remedy()}"
        ]
    return []


def refuse_not_finite(init: MethodSettings, method: str, figures: Mapping[str, float | None]) -> None:
    """Raise RunError where a figure of the start is NaN or infinite (named)."""
    for name, value in figures.items():
        if value is not None and not math.isfinite(value):
            raise RunError(f"the {name} is {value} after the start of {method}: {init.remedy()}")
