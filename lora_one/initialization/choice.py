"""The method that a caller of ``initialize_adapters`` chooses, by name or as a function, and whether it is possible."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from lora_one.config import method_settings, refuse_unknown
from lora_one.config.checked import Ranges
from lora_one.config.defaults import choices_of_init, defaults_of
from lora_one.config.methods.base import GradientSettings, MethodSettings
from lora_one.errors import UsageError, nearest
from lora_one.initialization.methods import Method, build_init, refuse_unready
from lora_one.linalg import LowRank
from lora_one.model_kinds import CAUSAL, ModelKind
from lora_one.types import AdapterFactors, LayerView

OwnMethod = Callable[[LayerView, LowRank | None], AdapterFactors]
# keys by which a run selects examples, and others that the library has its own arguments for
OF_A_RUN = ("method", "cache", "bsz", "iters", "do_subsampling", "sub_size", "max_length", "search_examples")


@dataclass(frozen=True, kw_only=True)
class OwnSettings(GradientSettings):
    """The settings of a caller's own function.

    needs_gradient: the function gets the low-rank step of each layer's gradient.  vectors: number of singular vectors
    in this step, as a multiple of the rank.
    """

    title: str = "own method"
    needs_gradient: bool = True
    vectors: int = 1

    ranges: ClassVar[Ranges] = {"vectors": ("at least 1", lambda v: v >= 1)}


@dataclass(frozen=True)
class Situation:
    """The facts that decide which methods are possible: about the model, the LoraConfig and the batches.

    dora, bias (of B), replicated (layers), ranks_by_layer: set in the LoraConfig.  examples: there are batches.
    """

    kind: ModelKind
    quantised: bool
    dora: bool
    bias: bool
    replicated: bool
    ranks_by_layer: bool
    examples: bool

    def obstacle(self, init: MethodSettings) -> str | None:
        """Return why a method is not possible; None: it is possible."""
        if init.needs_examples and not self.examples:
            return "it uses training examples: pass batches"
        if init.shifts_base and self.quantised:
            return "it changes the base weights, but the model is quantised: load the model without quantisation"
        if init.trains_core and self.dora:
            return "it trains only an r x r core, but use_dora=True trains magnitudes: remove use_dora"
        if init.trains_core and self.bias:
            return "it trains only an r x r core, but lora_bias=True trains a bias of B: remove lora_bias"
        if init.by_peft and self.bias:
            return "PEFT computes it only without a bias of B: remove lora_bias"
        if init.by_peft and self.replicated:
            return "PEFT would replicate the layers twice: remove layer_replication"
        if init.by_peft and self.ranks_by_layer:
            return "PEFT computes it with one rank for all layers: remove rank_pattern"
        if init.sets_ranks and self.ranks_by_layer:
            return "it chooses the rank of each layer: remove rank_pattern"
        if init.sets_ranks and self.replicated:
            return "it chooses the ranks before layers are replicated: remove layer_replication"
        if init.causal_only and self.kind is not CAUSAL:
            return f"it works only with causal models, but the model is {self.kind.name}"
        if init.needs_quantised and not self.quantised:
            return "it compensates the quantisation error, but the model is not quantised: load it in 4 bits"
        try:
            refuse_unready(init)
        except UsageError as error:
            return str(error)
        return None

    def possible(self) -> list[str]:
        """Return the methods that are possible, by the name of their file in conf/init/."""
        names = sorted(set(choices_of_init().values()))
        return [name for name in names if self.obstacle(method_settings(defaults_of(name))) is None]


def chosen(method: str | OwnMethod, given: dict[str, Any], seed: int, situation: Situation) -> Method:
    """Return the method with its settings: those that are given, and defaults from conf/init/ for the others.

    Raises UsageError: no such method, a key or a value that it does not have, or the method is not possible here.
    """
    if callable(method):
        return own_method(method, given | {"seed": seed}, situation.examples)
    choices = choices_of_init()
    if method not in choices:
        raise UsageError(f"method={method} is not an initialisation; {nearest(method, choices)}")
    keys = defaults_of(choices[method])
    refuse_keys(str(method), given, set(keys) - {"seed"})
    init = method_settings(keys | given | {"seed": seed})
    init.check_values()
    init.check()
    reason = situation.obstacle(init)
    if reason is not None:
        raise UsageError(
            f"method={method} is not possible here: {reason}. Possible methods: {', '.join(situation.possible())}"
        )
    for key, meaning in init.from_training.items():
        if getattr(init, key) is None:
            raise UsageError(f"method={method} needs {key}, {meaning}: pass {key}=<number>")
    return build_init(init)


def refuse_keys(method: str, given: dict[str, Any], keys: set[str]) -> None:
    """Raise UsageError if a key is not one of the method's, or if it selects examples in a run."""
    readable = keys - set(OF_A_RUN)
    for key, value in given.items():
        if key in OF_A_RUN:
            raise UsageError(f"{key}={value} is a setting of a run: pass batches and examples=<number> instead")
        if key not in readable:
            raise UsageError(f"{key}={value} is not used by method={method}; {nearest(key, readable)}")


def own_method(function: OwnMethod, given: dict[str, Any], with_gradient: bool) -> Method:
    """Return a caller's function as a method. Raises UsageError: a key or a value that it does not have."""
    title = getattr(function, "__name__", type(function).__name__)
    keys = defaults_of("_gradient")
    refuse_keys(title, {key: value for key, value in given.items() if key != "seed"}, {*keys, "vectors"})
    keys |= {"method": title, "title": title, "needs_gradient": with_gradient}
    refuse_unknown("", keys | given, OwnSettings)
    init = OwnSettings(**keys | given)
    init.check_values()

    def factors(layer: LayerView, step: LowRank | None) -> AdapterFactors:
        return checked_factors(title, layer, function(layer, step))

    return Method(init, factors)


def checked_factors(title: str, layer: LayerView, found: Any) -> AdapterFactors:
    """Return what a caller's function returned for a layer, in fp32.

    Raises UsageError: it is not AdapterFactors, or the factors have wrong shapes or values that are not finite.
    """
    if not isinstance(found, AdapterFactors):
        raise UsageError(
            f"method={title} returned a {type(found).__name__} for {layer.name}: return lora_one.AdapterFactors(B, A)"
        )
    (m, n), r = layer.shape, layer.rank
    for letter, factor, shape in (("B", found.B, (m, r)), ("A", found.A, (r, n))):
        if tuple(factor.shape) != shape:
            raise UsageError(
                f"method={title} returned {letter} of shape {tuple(factor.shape)} for {layer.name}, but it must be "
                f"{shape}: return B (m, r) and A (r, n) with (m, n) = {layer.shape} and r = {r}"
            )
        if not torch.isfinite(factor).all():
            raise UsageError(f"method={title} returned {letter} with values that are not finite for {layer.name}")
    if found.R is not None:
        raise UsageError(f"method={title} returned R, but an own method can only return B and A: remove R")
    return AdapterFactors(found.B.detach().float(), found.A.detach().float(), found.shift_base)
