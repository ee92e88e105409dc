"""Initialisations: a pure function from a layer (and its gradient) to the factors, one file each.

To add one: its file here, its line in METHODS, its settings in config.py, its conf/init/<name>.yaml.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from lora_one.config import GradientInit
from lora_one.inits.lora_one import lora_one_factors
from lora_one.inits.simple import simple_factors
from lora_one.types import AdapterFactors, LayerView

METHODS: dict[str, Callable[..., AdapterFactors]] = {"LoRA-One": lora_one_factors, "simple": simple_factors}


@dataclass(frozen=True)
class Method:
    """A configured initialisation: ``factors(layer, gradient)``; the gradient is None unless it is needed."""

    name: str
    needs_gradient: bool
    factors: Callable[[LayerView, Tensor | None], AdapterFactors]


def build_init(init: Any) -> Method:
    """The method that ``init.mode`` (and ``init.direction``) names."""
    needs_gradient = isinstance(init, GradientInit)
    name = init.direction if needs_gradient else init.mode
    return Method(name, needs_gradient, partial(METHODS[name], init))
