"""Initialisation methods: pure functions from a layer (and the low-rank step of its gradient) to its factors.

Each is the function ``factors(settings, layer, step)`` in the file that its settings name, see config/methods. Methods
that PEFT computes for all layers at once are in peft_methods.py.
"""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from lora_one.config.methods import MethodSettings
from lora_one.errors import UsageError
from lora_one.types import AdapterFactors, LayerView, Measured


@dataclass(frozen=True)
class Method:
    """A configured initialisation: its settings and the functions that compute the factors.

    factors: returns those of one layer; the step is None if the method uses no gradient.
    of_all_layers: set instead of ``factors`` if PEFT computes the factors of all layers, see ``peft_methods``.
    transform: applied to the gradient before it is factorised; None: nothing.
    rearrange: applied to the factors after the search for their scale; None: nothing.
    measure, ranks: set if the method chooses the ranks, see ``ranked_start``; ``factors`` then gets what ``measure``
    returned, instead of a step.
    """

    settings: MethodSettings
    factors: Callable[[LayerView, Any], AdapterFactors] | None
    of_all_layers: Callable[..., dict[str, AdapterFactors]] | None = None
    transform: Callable[[Tensor], Tensor] | None = None
    rearrange: Callable[[LayerView, AdapterFactors], AdapterFactors] | None = None
    measure: Callable[[LayerView, Tensor], Measured] | None = None
    ranks: Callable[[Mapping[str, float], Mapping[str, tuple[int, int]], int], dict[str, int]] | None = None


def build_init(settings: MethodSettings) -> Method:
    """Return the method of these settings with its functions.

    Raises UsageError: a package that the method needs is not installed.
    """
    refuse_unready(settings)
    module = importlib.import_module(f"{__name__}.{settings.module}")
    if settings.by_peft:
        return Method(settings, None, of_all_layers=partial(module.factors_of_all_layers, settings))
    transform = None if settings.transform is None else getattr(module, settings.transform)
    rearrange = None if settings.rearrangement is None else partial(getattr(module, settings.rearrangement), settings)
    chosen = ("measure", "ranks") if settings.sets_ranks else ()
    more = {name: partial(getattr(module, name), settings) for name in chosen}
    return Method(settings, partial(module.factors, settings), transform=transform, rearrange=rearrange, **more)


def refuse_unready(settings: MethodSettings) -> None:
    """Raise UsageError if a package that the method needs is not installed."""
    missing = [package for package, module in settings.packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UsageError(
            f"init={settings.method} needs {' and '.join(missing)}, not installed here: run pip install "
            f"'lora-one[{settings.extra}]'"
        )
