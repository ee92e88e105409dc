"""Initialisations: a pure function from a layer (and the low-rank step of its gradient) to the factors, one file each.

To add one: its file here, its line in METHODS, its settings in config.py, its conf/init/<name>.yaml.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from lora_one.config import GradientInit
from lora_one.inits.lora_ga import lora_ga_factors
from lora_one.inits.lora_one import lora_one_factors
from lora_one.inits.lora_sb import descent_signs, lora_sb_factors
from lora_one.inits.lora_xs import lora_xs_factors
from lora_one.inits.simple import simple_factors
from lora_one.inits.svd import svd_factors
from lora_one.linalg import LowRank
from lora_one.types import AdapterFactors, LayerView

METHODS: dict[str, Callable[..., AdapterFactors]] = {
    "LoRA-One": lora_one_factors,
    "LoRA-GA": lora_ga_factors,
    "LoRA-SB": lora_sb_factors,
    "lora_xs": lora_xs_factors,
    "simple": simple_factors,
    "svd": svd_factors,
}
VECTORS = {"LoRA-GA": 2}  # singular vectors wanted, in ranks; 1 unless named
TRANSFORMS = {"LoRA-SB": descent_signs}  # of the gradient, before its SVD; none unless named


@dataclass(frozen=True)
class Method:
    """A configured initialisation: ``factors(layer, step)``; the step is None unless a gradient is needed.

    vectors: singular vectors of the gradient wanted, as a multiple of the rank.
    transform: what of the gradient is factorised (None: the gradient itself).
    """

    name: str
    needs_gradient: bool
    vectors: int
    transform: Callable[[Tensor], Tensor] | None
    factors: Callable[[LayerView, LowRank | None], AdapterFactors]


def build_init(init: Any) -> Method:
    """The method that ``init.mode`` (and ``init.direction``) names."""
    needs_gradient = isinstance(init, GradientInit)
    name = init.direction if needs_gradient else init.mode
    return Method(name, needs_gradient, VECTORS.get(name, 1), TRANSFORMS.get(name), partial(METHODS[name], init))
