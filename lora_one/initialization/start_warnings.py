"""Check whether an initialisation harms the model: warnings for the screen and run.json, or an error."""

import math
from collections.abc import Mapping
from typing import Any

from lora_one.config.methods import MethodSettings
from lora_one.errors import RunError

LITTLE = 1e-2  # relative decrease of the loss
RISE = 1e-3  # relative; a smaller increase of the loss is rounding in a 16-bit base


def start_warnings(init: MethodSettings, record: Mapping[str, Any]) -> list[str]:
    """Return a warning if the initialisation raised the loss on its examples, or its step is too large or almost none.

    A step is too large if its first-order decrease exceeds the loss itself, because the loss cannot become negative.
    This is not checked after a search for the scale, which measured the loss.
    record: ``init`` of run.json (method, examples, loss_before, loss_after, predicted_decrease, searched).
    """
    before, after, predicted = (record[key] for key in ("loss_before", "loss_after", "predicted_decrease"))
    if before is None or after is None:
        return []
    if after > before * (1 + RISE):
        return [
            f"the initialisation by {record['method']} raised the loss on its {record['examples']} examples from "
            f"{before:.4f} to {after:.4f}: {init.remedy()}"
        ]
    if predicted is not None and predicted > before and not record["searched"]:
        return [
            f"the initialisation by {record['method']} takes too large a step: its first-order approximation predicts "
            f"that the loss decreases by {predicted:.4f}, but the loss before it was only {before:.4f} (and "
            f"{after:.4f} after it): {init.remedy()}"
        ]
    others = (record["searched"] or {}).get("other_examples")
    if others and before - after < LITTLE * before:
        return [
            f"the initialisation by {record['method']} is almost no step: the loss on its {record['examples']} "
            f"examples goes from {before:.4f} to {after:.4f} only, because no larger step lowers the loss on the "
            f"{others} other examples of the search; training begins nearly as without it. Use more examples: raise "
            "init.iters"
        ]
    return []


def refuse_not_finite(init: MethodSettings, method: str, figures: Mapping[str, float | None]) -> None:
    """Raise RunError if a figure of the initialisation is NaN or infinite (the figure is named)."""
    for name, value in figures.items():
        if value is not None and not math.isfinite(value):
            raise RunError(f"the {name} is {value} after the initialisation by {method}: {init.remedy()}")
