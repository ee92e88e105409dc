"""The start of every adapter: from a method and the examples it looks at to factors in the model."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from lora_one.adaptation.layers import (
    ADAPTER,
    FactorPairs,
    fused_experts,
    layer_view,
    lora_layers,
    put,
    refuse_quantised,
    relative_shift,
    shift_base,
)
from lora_one.adaptation.lora import Lora
from lora_one.adaptation.wrapping import lora_config, quiet_peft, unwrapped_on_error
from lora_one.errors import RunError, UsageError
from lora_one.initialization.backward import GradientReport
from lora_one.initialization.forward_batches import batches_loss, forward_batches
from lora_one.initialization.low_rank_step import Step, StepSettings, low_rank_steps
from lora_one.initialization.methods import Method
from lora_one.initialization.search import EVALUATIONS, line_search
from lora_one.losses import Batch, Reduction, loss_count, targets
from lora_one.types import AdapterFactors


@dataclass(frozen=True)
class Probe:
    """What a method looks at: collated batches, how their losses are averaged, and the settings of a gradient's SVD.

    search: other batches for the search of the scale; None: the same ones.
    vectors: the solution is to hold the gradients' leading singular vectors.
    """

    batches: Sequence[Batch]
    reduction: Reduction
    settings: StepSettings = field(default_factory=StepSettings)
    vectors: bool = False
    search: Sequence[Batch] | None = None


@dataclass(frozen=True)
class Solution:
    """What an initialisation found: the factors of each layer, fp32, and what is to be told of them.

    energies: captured share ||[G]_r||^2 / ||G||^2 by layer.  examples: None for a method that looks at none.
    predicted_decrease: of the loss on the examples, to first order: - sum over layers <G, s B A>; of gradient methods.
    searched: gamma -> loss, of a scale that was searched for (None: not finite).  gamma: the one that was chosen.
    loss: on the examples with these factors, where a search has measured it.
    searched_on: how many other examples the scale was searched on; 0: on the gradient's own.
    cached: it was found before, and read.
    vectors: (U_r, Vh_r) of [G]_r by layer, where the probe asks for them.
    """

    factors: dict[str, AdapterFactors]
    energies: dict[str, float] = field(default_factory=dict)
    examples: GradientReport | None = None
    predicted_decrease: float | None = None
    searched: dict[float, float | None] = field(default_factory=dict)
    gamma: float | None = None
    cached: bool = False
    vectors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    loss: float | None = None
    searched_on: int = 0


@dataclass(frozen=True)
class Start:
    """A solution as it stands in the model.

    relative_shift: ||s B A||_F / ||W||_F by layer.
    initial_factors: (B0, A0) of the layers whose base became W - s B0 A0; they are needed to save and to resume.
    """

    solution: Solution
    relative_shift: dict[str, float]
    initial_factors: FactorPairs

    @property
    def kept(self) -> FactorPairs:
        """The earlier name of ``initial_factors``."""
        return self.initial_factors


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
    """Wrap the base in PEFT and start every adapter at the method's factors.

    lora: LoRA's factors, or an r x r core.

    originals: gives a quantised layer's weight as it was before.
    cached: gives the solution, or has it found by what it is handed; see ``start.cache``.
    Raises RunError: a gradient that is zero or not finite (the layer is named), or what PEFT could not do.
    UsageError: the method changes the base, and the base is quantised.
    """
    layers = lora.layers(base, method.settings)
    if lora.peft.lora_target_modules == "all":
        warn_of_experts(base)
    found = cached or (lambda find: find())
    if method.of_all_layers is None:
        model = lora.start(base, 0)
        with unwrapped_on_error(model, ()):
            return model, place(model, found(lambda: solve(model, method, probe, seed, originals)))
    solution = found(lambda: solve_by_peft(base, layers, partial(lora_config, base, lora.peft), method, probe, seed))
    model = lora.start(base, 0)
    return model, place(model, solution)


def warn_of_experts(base: nn.Module) -> None:
    """A mixture's experts may be most of a model, and are left as they are where they are no layers."""
    experts = fused_experts(base)
    if experts:
        share = sum(map(nn.Parameter.numel, experts.values())) / sum(map(nn.Parameter.numel, base.parameters()))
        warnings.warn(
            f"{len(experts)} tensors of fused experts are left as they are, {share:.0%} of the parameters "
            f"({next(iter(experts))} is the first): only linear layers are adapted",
            stacklevel=3,
        )


def solve(
    model: PeftModel,
    method: Method,
    probe: Probe | None,
    seed: int,
    originals: Callable[[str], Tensor] | None = None,
) -> Solution:
    """Factors of every LoRA layer, from the model without its adapters.

    Each layer's G becomes its low-rank step as soon as it is known and is freed; only the factors stay.
    Raises as ``attach_adapters``.
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
        report = low_rank_steps(model.get_base_model(), bare, probe.batches, probe.reduction, settings, found.add)
    solution = found.solution(report)
    if method.settings.search_from is None:
        return solution
    with as_run_errors():
        return searched(model, solution, method, probe)


@dataclass
class LayerStarts:
    """Factors of the layers done so far, and what run.json records of them.

    keep_vectors: keep the gradients' leading singular vectors.  decreases: first-order decreases of the loss.
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
        """Find the factors of one layer. Raises UsageError: the method changes its base, which is quantised."""
        layer = self.layers[name]
        found = self.method.factors(layer_view(name, layer, self.seed, self.originals), step)
        if found.shift_base:
            refuse_quantised(name, layer.get_base_layer())
        if step is not None:
            self.energies[name] = step.energy
            if self.keep_vectors:
                r = layer.r[ADAPTER]
                self.vectors[name] = (step.U[:, :r].cpu(), step.Vh[:r].cpu())
            self.decreases.append(0.0 if found.shift_base else layer.scaling[ADAPTER] * first_order(found, step))
        self.factors[name] = found

    def solution(self, report: GradientReport) -> Solution:
        """Return the factors and their record, of a method that takes a gradient."""
        return Solution(self.factors, self.energies, report, sum(self.decreases), vectors=self.vectors)


def solve_by_peft(
    base: nn.Module, layers: dict[str, nn.Module], configure: Any, method: Method, probe: Probe | None, seed: int
) -> Solution:
    """As ``solve``, where PEFT finds the factors of all layers of the bare base."""
    with as_run_errors():
        report = looked_at(base, probe) if method.settings.needs_examples else None
        batches = probe.batches if method.settings.needs_examples else ()
        return Solution(method.of_all_layers(base, layers, configure, batches, seed), examples=report)


@contextmanager
def as_run_errors() -> Iterator[None]:
    """Turn a ValueError within the block into a RunError of one line."""
    try:
        yield
    except UsageError:
        raise
    except ValueError as error:
        raise RunError(f"init: {error}") from error


def first_order(factors: AdapterFactors, step: Step) -> float:
    """- <G, B R A>, exact for factors within the span of the step's vectors that are diagonal in them."""
    B = factors.B if factors.R is None else factors.B @ factors.R
    inner = ((step.U.T @ B) * (factors.A @ step.Vh.T).T).sum(dim=1)  # diagonal of U^T B A V
    return -float((inner * step.slopes).sum())


def place(model: PeftModel, solution: Solution) -> Start:
    """Write a solution into the model: the base is shifted where the method says so, then the factors are put."""
    layers = lora_layers(model)
    # as the adapter will hold them: what the base loses is then what the adapter adds, also in 16 bit
    factors = {name: rounded(found, layers[name]) for name, found in solution.factors.items()}
    shifts = {name: relative_shift(layers[name], found) for name, found in factors.items()}
    initial_factors = {name: (found.B, found.A) for name, found in factors.items() if found.shift_base}
    shift_base(model, initial_factors)
    for name, found in factors.items():
        put(layers[name], found)
    return Start(solution, shifts, initial_factors)


def rounded(factors: AdapterFactors, layer: Any) -> AdapterFactors:
    dtype = layer.lora_A[ADAPTER].weight.dtype
    R = None if factors.R is None else factors.R.to(dtype).float()
    return AdapterFactors(factors.B.to(dtype).float(), factors.A.to(dtype).float(), factors.shift_base, R)


def searched(model: PeftModel, solution: Solution, method: Method, probe: Probe) -> Solution:
    """Return the solution at the gamma of the least loss found by a line search; B A is proportional to 1 / gamma."""
    layers = lora_layers(model)
    forward = forward_batches(model, probe.search or probe.batches)

    def times(multiple: float) -> dict[str, AdapterFactors]:
        root = math.sqrt(multiple)
        return {name: replace(found, B=found.B * root, A=found.A * root) for name, found in solution.factors.items()}

    def loss_at(multiple: float) -> float:
        for name, found in times(multiple).items():
            put(layers[name], found)
        return batches_loss(model, forward, probe.reduction)

    before, evaluations = solution.examples.loss, EVALUATIONS
    if probe.search:
        evaluations -= 1  # this one counts
        with quiet_peft(), model.disable_adapter():
            before = batches_loss(model, forward, probe.reduction)
    search_from = method.settings.search_from
    multiple, losses = line_search(loss_at, before, solution.predicted_decrease, evaluations)
    return replace(
        solution,
        factors=times(multiple),
        predicted_decrease=solution.predicted_decrease * multiple,
        searched={search_from / tried: loss if math.isfinite(loss) else None for tried, loss in sorted(losses.items())},
        gamma=search_from / multiple,
        loss=None if probe.search else losses[multiple],
        searched_on=sum(len(batch["labels"]) for batch in probe.search or ()),
    )


def probe_loss(model: nn.Module, probe: Probe) -> float:
    """Return the mean loss on the examples, dropout off; several processes share them, and all get the same."""
    return batches_loss(model, forward_batches(model, probe.batches), probe.reduction)


def looked_at(base: nn.Module, probe: Probe) -> GradientReport:
    """Examples, tokens and loss of the probe. Raises ValueError: the loss is not finite."""
    loss = probe_loss(base, probe)
    if not math.isfinite(loss):
        raise ValueError(f"the loss on the initialisation examples is {loss}")
    examples = sum(len(batch["labels"]) for batch in probe.batches)
    return GradientReport(examples, sum(loss_count(targets(batch), "token") for batch in probe.batches), loss)
