"""Initialisations: a pure function from a layer (and the low-rank step of its gradient) to the factors, one file each.

To add one: its file here, its line in METHODS, its settings in config/schemas.py, its conf/init/<name>.yaml.
Those that PEFT computes for all layers at once are in from_peft.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from lora_one.config.schemas import GradientInit, PeftInit, PissaInit, ProbedInit, SvdInit
from lora_one.initialization.methods.loftq import loftq_factors
from lora_one.initialization.methods.lora import simple_factors
from lora_one.initialization.methods.lora_ga import lora_ga_factors
from lora_one.initialization.methods.lora_one import lora_one_factors
from lora_one.initialization.methods.lora_sb import descent_signs, lora_sb_factors
from lora_one.initialization.methods.lora_xs import lora_xs_factors
from lora_one.initialization.methods.peft_methods import peft_factors, refuse_unready
from lora_one.initialization.methods.svd import svd_factors
from lora_one.linalg import LowRank
from lora_one.types import AdapterFactors, LayerView

METHODS: dict[str, Callable[..., AdapterFactors]] = {
    "LoRA-One": lora_one_factors,
    "LoRA-GA": lora_ga_factors,
    "LoRA-SB": lora_sb_factors,
    "lora_xs": lora_xs_factors,
    "loftq": loftq_factors,
    "simple": simple_factors,
    "svd": svd_factors,
}
VECTORS = {"LoRA-GA": 2, "lora_ga_peft": 2}  # singular vectors wanted, in ranks; 1 unless named
TITLES = {"simple": "LoRA", "lora_xs": "LoRA-XS", "loftq": "LoftQ"}  # the key itself unless named
TRANSFORMS = {"LoRA-SB": descent_signs}  # of the gradient, before its SVD; none unless named


@dataclass(frozen=True)
class Method:
    """A configured initialisation: ``factors(layer, step)``; the step is None unless a gradient is needed.

    vectors: singular vectors of the gradient wanted, as a multiple of the rank.
    needs_examples: looks at training examples, for a gradient or otherwise.
    of_all_layers: set instead of ``factors`` where PEFT finds the factors of all layers, see ``peft_factors``.
    transform: what of the gradient is factorised (None: the gradient itself).
    search_from: the gamma whose neighbours are searched for the least loss; None: the scale is given.
    """

    name: str
    needs_gradient: bool
    vectors: int
    factors: Callable[[LayerView, LowRank | None], AdapterFactors] | None
    needs_examples: bool = False
    transform: Callable[[Tensor], Tensor] | None = None
    of_all_layers: Callable[..., dict[str, AdapterFactors]] | None = None
    search_from: float | None = None


def build_init(init: Any) -> Method:
    """The method that ``init.mode`` (and ``init.direction`` or ``init.method``) names.

    Raises UsageError: a method that cannot run here, for want of a package, say.
    """
    needs_examples = isinstance(init, ProbedInit)
    if isinstance(init, PissaInit) and init.niter is None:
        svd = SvdInit(init.mode, init.dtype, init.seed, init.cache, "default", None, init.tolerance)
        return Method(init.method, False, 1, partial(svd_factors, svd))
    if isinstance(init, PeftInit):
        refuse_unready(init)
        vectors = VECTORS.get(init.method, 1)
        return Method(init.method, False, vectors, None, needs_examples, of_all_layers=partial(peft_factors, init))
    needs_gradient = isinstance(init, GradientInit)
    name = init.direction if needs_gradient else init.mode
    return Method(
        TITLES.get(name, name),
        needs_gradient,
        VECTORS.get(name, 1),
        partial(METHODS[name], init),
        needs_examples,
        TRANSFORMS.get(name),
        search_from=init.gamma if needs_gradient and init.scale == "search" else None,
    )
