"""Initialise the adapters of a model: compute the factors with a method and write them into the model."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from lora_one.adaptation.layers import (
    ADAPTER,
    fused_experts,
    layer_view,
    lora_layers,
    put,
    refuse_quantised,
    relative_shift,
    scaling_of,
    shift_base,
)
from lora_one.adaptation.lora import Lora
from lora_one.adaptation.structure import unchanged_on_error
from lora_one.adaptation.wrapping import lora_config, quiet_peft
from lora_one.distributed import Processes
from lora_one.errors import RunError, UsageError
from lora_one.initialization.backward import GradientReport
from lora_one.initialization.forward_batches import batches_loss, forward_batches
from lora_one.initialization.low_rank_step import Step, low_rank_steps
from lora_one.initialization.methods import Method
from lora_one.initialization.moments import Moments, layer_moments
from lora_one.initialization.ranked_start import solve_with_ranks
from lora_one.initialization.scale_search import with_searched_scale
from lora_one.initialization.solution import Probe, Solution, Start
from lora_one.linalg import truncated_svd
from lora_one.losses import loss_count, targets
from lora_one.models import weight_shape
from lora_one.types import AdapterFactors, LayerView


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
        warn_of_experts(base)
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


def warn_of_experts(base: nn.Module) -> None:
    """Warn if the experts of a mixture are not linear layers, because they may be most of the model."""
    experts = fused_experts(base)
    if experts:
        share = sum(map(nn.Parameter.numel, experts.values())) / sum(map(nn.Parameter.numel, base.parameters()))
        warnings.warn(
            f"{len(experts)} tensors of fused experts, {share:.0%} of the parameters, are not adapted, because only "
            f"linear layers can be (the first tensor is {next(iter(experts))})",
            stacklevel=3,
        )


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


@dataclass
class LayerStarts:
    """The factors of the layers computed so far, and their figures for run.json.

    keep_vectors: store the leading singular vectors of the gradients.  decreases: first-order decreases of the loss.
    """

    layers: dict[str, Any]
    method: Method
    seed: int
    originals: Callable[[str], Tensor] | None
    keep_vectors: bool
    factors: dict[str, AdapterFactors] = field(default_factory=dict)
    energies: dict[str, float] = field(default_factory=dict)
    decreases: list[float] = field(default_factory=list)
    vectors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def add(self, name: str, step: Step | None) -> None:
        """Compute the factors of one layer.

        Raises UsageError: the method changes the base, and this layer is quantised or sharded.
        """
        layer = self.layers[name]
        found = self.method.factors(self.view(name), step)
        if found.shift_base:
            refuse_quantised(name, layer.get_base_layer())
        if step is not None:
            self.energies[name] = step.energy
            if self.keep_vectors:
                r = layer.r[ADAPTER]
                self.vectors[name] = (step.U[:, :r].cpu(), step.Vh[:r].cpu())
            self.decreases.append(0.0 if found.shift_base else layer.scaling[ADAPTER] * first_order(found, step))
        self.factors[name] = found

    def view(self, name: str) -> LayerView:
        """Return what the method can read of one layer."""
        return layer_view(name, self.layers[name], self.seed, self.originals)

    def add_from_moments(self, name: str, owner: int, moments: Moments | None) -> None:
        """Compute the factors of one layer on its owner, which alone has the moments, and send them to all processes.

        Raises ValueError, on every process: see the method.
        """
        processes, layer = Processes.current(), self.layers[name]
        m, n = weight_shape(layer.get_base_layer())
        r, message, own = layer.r[ADAPTER], "", None
        if moments is not None:
            try:
                own = self.measured(name, moments)
            except ValueError as error:
                message = str(error)
        for refused in filter(None, processes.gathered(message)):
            raise ValueError(refused)
        device = layer.get_base_layer().weight.device
        sizes = [m * r, r * n, 2, m * r * self.keep_vectors, r * n * self.keep_vectors]
        flat = torch.empty(sum(sizes), device=device) if own is None else own.to(device)
        B, A, figures, U, Vh = processes.from_owner(owner, flat).split(sizes)
        self.factors[name] = AdapterFactors(B.view(m, r), A.view(r, n))
        self.energies[name], decrease = figures.tolist()
        self.decreases.append(decrease)
        if self.keep_vectors:
            self.vectors[name] = (U.view(m, r).cpu(), Vh.view(r, n).cpu())

    def measured(self, name: str, moments: Moments) -> Tensor:
        """Return one vector of: B, A, the share of ||G||^2 in the span of A, the decrease, and the vectors of [G]_r."""
        layer, G, view = self.layers[name], moments.gradient, self.view(name)
        found = self.method.factors(view, moments)
        rows = torch.linalg.qr(found.A.T.to(G)).Q
        energy = (G @ rows).square().sum() / G.square().sum()
        decrease = -layer.scaling[ADAPTER] * ((G.T @ found.B.to(G)) * found.A.T.to(G)).sum()
        parts = [found.B, found.A, torch.stack([energy, decrease])]
        if self.keep_vectors:
            step = truncated_svd(G, view.rank, tolerance=self.method.settings.tolerance, generator=view.generator)
            parts += [step.U, step.Vh]
        return torch.cat([part.float().reshape(-1) for part in parts])

    def solution(self, report: GradientReport) -> Solution:
        """Return the solution of a method that uses a gradient."""
        return Solution(self.factors, self.energies, report, sum(self.decreases), vectors=self.vectors)

    def rearranged(self, solution: Solution) -> Solution:
        """Return the solution with rearranged factors of the same scale.

        Neither their first-order decrease nor their loss is known: ``first_order`` needs factors in the basis of the
        step, and the search measured the loss of the others.
        """
        factors = {name: self.method.rearrange(self.view(name), found) for name, found in solution.factors.items()}
        return replace(solution, factors=factors, predicted_decrease=None, loss=None)


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


def first_order(factors: AdapterFactors, step: Step) -> float:
    """Return - <G, B R A>; exact for factors in the span of the step's vectors that are diagonal in this basis."""
    B = factors.B if factors.R is None else factors.B @ factors.R
    inner = ((step.U.T @ B) * (factors.A @ step.Vh.T).T).sum(dim=1)  # diagonal of U^T B A V
    return -float((inner * step.slopes).sum())


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
    """Return the factors rounded to the dtype of the layer's adapter, in fp32."""
    dtype = layer.lora_A[ADAPTER].weight.dtype
    R = None if factors.R is None else factors.R.to(dtype).float()
    return AdapterFactors(factors.B.to(dtype).float(), factors.A.to(dtype).float(), factors.shift_base, R)


def probe_loss(model: nn.Module, probe: Probe) -> float:
    """Return the mean loss on the examples without dropout; several processes share them and get the same result."""
    return batches_loss(model, forward_batches(model, probe.batches), probe.reduction)


def report_of(base: nn.Module, probe: Probe) -> GradientReport:
    """Return the examples, tokens and loss of the probe. Raises ValueError: the loss is not finite."""
    loss = probe_loss(base, probe)
    if not math.isfinite(loss):
        raise ValueError(f"the loss on the initialisation examples is {loss}")
    examples = sum(len(batch["labels"]) for batch in probe.batches)
    return GradientReport(examples, sum(loss_count(targets(batch), "token") for batch in probe.batches), loss)
