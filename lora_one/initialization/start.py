"""Initialise the adapters of a model: compute the factors with a method and write them into the model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from lora_one.adaptation.experts import warn_of_experts
from lora_one.adaptation.layers import (
    ADAPTER,
    adaptable_layers,
    lora_layers,
    put,
    relative_shift,
    scaling_of,
    shift_base,
)
from lora_one.adaptation.lora import Lora
from lora_one.adaptation.structure import unchanged_on_error
from lora_one.adaptation.wrapping import lora_config, quiet_peft
from lora_one.errors import RunError, UsageError
from lora_one.initialization.backward import GradientReport
from lora_one.initialization.forward_batches import batches_loss, forward_batches
from lora_one.initialization.layer_starts import LayerStarts
from lora_one.initialization.low_rank_step import low_rank_steps
from lora_one.initialization.methods import Method
from lora_one.initialization.moments import layer_moments
from lora_one.initialization.ranked_start import solve_with_ranks
from lora_one.initialization.scale_search import with_searched_scale
from lora_one.initialization.solution import Probe, Solution, Start
from lora_one.types import AdapterFactors


def attach_adapters(
    base: nn.Module,
    lora: Lora,
    method: Method,
    probe: Probe | None,
    *,
    seed: int,
    cached: Callable[[Callable[[], Solution]], Solution] | None = None,
    originals: Callable[[str], Tensor] | None = None,
) -> tuple[PeftModel, Start]:
    """Wrap the base in PEFT and initialise every adapter with the method's factors.

    lora: plain LoRA, or an r x r core.
    cached: returns the solution, if necessary by calling its argument; see ``initialization.cache``.
    originals: returns the weight of a layer before quantisation, by the layer's name; only for a quantised base.
    Raises RunError: a gradient is zero or not finite (the layer is named), or PEFT failed. UsageError: the method
    changes the base, and the base is quantised or sharded.
    """
    layers = lora.layers(base, method.settings)
    if lora.peft.lora_target_modules == "all":
        warn_of_experts(base, adaptable_layers(base)[1])
    found = cached or (lambda find: find())
    with unchanged_on_error(base):
        if method.settings.sets_ranks:
            solution = found(lambda: ranked(base, lora, method, probe, seed))
            model = lora.start(base, 0, solution.ranks)
            return model, place(model, solution)
        if method.of_all_layers is None:
            model = lora.start(base, 0)
            return model, place(model, found(lambda: solve(model, method, probe, seed, originals)))
        configure = partial(lora_config, base, lora.peft)
        solution = found(lambda: solve_by_peft(base, layers, configure, method, probe, seed))
        model = lora.start(base, 0)
        return model, place(model, solution)


def ranked(base: nn.Module, lora: Lora, method: Method, probe: Probe | None, seed: int) -> Solution:
    """Return the factors of a method that chooses the ranks, for the layers of the bare base."""

    def scaling(name: str, rank: int) -> float:
        return scaling_of(replace(lora.peft, lora_r=rank))

    with as_run_errors():
        layers = lora.layers(base, method.settings)
        return solve_with_ranks(base, layers, method, probe, seed, lora.peft.lora_r, scaling)


def solve(
    model: PeftModel,
    method: Method,
    probe: Probe | None,
    seed: int,
    originals: Callable[[str], Tensor] | None = None,
) -> Solution:
    """Return the factors of every LoRA layer, computed from the model with its adapters switched off.

    The gradient of a layer is freed as soon as the layer's factors are known. Raises the same errors as
    ``attach_adapters``.
    """
    layers = lora_layers(model)
    found = LayerStarts(layers, method, seed, originals, probe is not None and probe.vectors)
    with quiet_peft(), model.disable_adapter(), as_run_errors():
        if not method.settings.needs_gradient:
            for name in layers:
                found.add(name, None)
            return Solution(found.factors)
        settings = replace(
            probe.settings,
            singular={name: method.settings.vectors * layer.r[ADAPTER] for name, layer in layers.items()},
            seed=seed,
            transform=method.transform,
        )
        bare = {name: layer.get_base_layer() for name, layer in layers.items()}
        base, batches, reduction = model.get_base_model(), probe.batches, probe.reduction
        if method.settings.needs_moments:
            report = layer_moments(
                base,
                bare,
                batches,
                reduction,
                found.add_from_moments,
                memory=settings.memory,
                checkpointing=settings.checkpointing,
            )
        else:
            report = low_rank_steps(base, bare, batches, reduction, settings, found.add)
    solution = found.solution(report)
    if method.settings.search_from is not None:
        with as_run_errors():
            solution = with_searched_scale(model, solution, method.settings.search_from, probe)
    return solution if method.rearrange is None else found.rearranged(solution)


def solve_by_peft(
    base: nn.Module, layers: dict[str, nn.Module], configure: Any, method: Method, probe: Probe | None, seed: int
) -> Solution:
    """Return the factors that PEFT computes for all layers of the base at once.

    configure: see ``methods.peft_methods.factors_of_all_layers``. Raises the same errors as ``attach_adapters``.
    """
    with as_run_errors():
        report = report_of(base, probe) if method.settings.needs_examples else None
        batches = probe.batches if method.settings.needs_examples else ()
        return Solution(method.of_all_layers(base, layers, configure, batches, seed), examples=report)


@contextmanager
def as_run_errors() -> Iterator[None]:
    """Return a context that turns a ValueError into a RunError, which is reported in one line."""
    try:
        yield
    except UsageError:
        raise
    except ValueError as error:
        raise RunError(f"init: {error}") from error


def place(model: PeftModel, solution: Solution) -> Start:
    """Write a solution into the model: change the base if the method requires it, then write the factors."""
    layers = lora_layers(model)
    # rounded as in the adapter, so that the base loses exactly what the adapter adds, also in 16 bits
    factors = {name: rounded(found, layers[name]) for name, found in solution.factors.items()}
    shifts = {name: relative_shift(layers[name], found) for name, found in factors.items()}
    initial_factors = {name: (found.B, found.A) for name, found in factors.items() if found.shift_base}
    shift_base(model, initial_factors)
    for name, found in factors.items():
        put(layers[name], found)
    return Start(solution, shifts, initial_factors)


def rounded(factors: AdapterFactors, layer: Any) -> AdapterFactors:
    """Return the factors rounded to the dtype of the layer's adapter, in fp32.

    They are contiguous, as after a file was read, so that a product of theirs has the same digits in both cases.
    """
    dtype = layer.lora_A[ADAPTER].weight.dtype
    B, A, R = (F if F is None else F.to(dtype).float().contiguous() for F in (factors.B, factors.A, factors.R))
    return AdapterFactors(B, A, factors.shift_base, R)


def probe_loss(model: nn.Module, probe: Probe) -> float:
    """Return the mean loss on the examples without dropout; several processes share them and get the same result."""
    return batches_loss(model, forward_batches(model, probe.batches), probe.reduction)


def report_of(base: nn.Module, probe: Probe) -> GradientReport:
    """Return the examples, tokens and loss of the probe. Raises ValueError: the loss is not finite."""
    return GradientReport.of(probe.batches, probe_loss(base, probe))
