"""The low-rank step of every target layer: the truncated SVD of its mean gradient."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from lora_one.config.methods import MethodSettings
from lora_one.distributed import Processes
from lora_one.initialization.activations import activations_of
from lora_one.initialization.gradients import GradientReport, mean_gradients, zero_gradient
from lora_one.initialization.holding import Memory, Place, grouped, how_to_hold
from lora_one.initialization.sketch import sketched_steps
from lora_one.linalg import LowRank, completed, full_precision, truncated_svd
from lora_one.losses import Batch, Reduction
from lora_one.models import weight_shape
from lora_one.seeding import generator_for


@dataclass(frozen=True)
class Step(LowRank):
    """The low-rank step of a gradient G.

    slopes: (r,) u_i^T G v_i, the first-order change of the loss per unit of u_i v_i^T; equal to S without a transform.
    If G has fewer than r directions above the rounding errors, the other S_i are exactly 0 and their vectors are random
    (``linalg.completed``).
    """

    slopes: Tensor

    @property
    def usable(self) -> int:
        """Return the number of directions above the rounding errors."""
        return int((self.S > 0).sum())

    @classmethod
    def of(cls, low_rank: LowRank, slopes: Tensor | None = None) -> "Step":
        """Return the step of a truncated SVD; without slopes, they are S."""
        return cls(**vars(low_rank), slopes=low_rank.S if slopes is None else slopes)


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """Settings of the low-rank step.

    singular: number of singular values, one for all layers or by layer.  tolerance: see ``linalg.truncated_svd``.
    transform: applied to G before the SVD; None: nothing.  memory: see ``holding.how_to_hold``.
    checkpointing: see ``gradients.mean_gradients``.
    """

    singular: int | Mapping[str, int] = 8
    tolerance: float = 1e-3
    seed: int = 0
    memory: Memory = "auto"
    transform: Callable[[Tensor], Tensor] | None = None
    checkpointing: bool = False

    @classmethod
    def of(cls, init: MethodSettings, *, checkpointing: bool) -> "StepSettings":
        """Return the settings of a method that uses a gradient; what it does not read keeps its default."""
        read = {key: getattr(init, key) for key in ("tolerance", "memory") if hasattr(init, key)}
        return cls(**read, checkpointing=checkpointing)

    def singular_of(self, name: str) -> int:
        """Return the number of singular values of a layer."""
        return self.singular if isinstance(self.singular, int) else self.singular[name]


@full_precision()
def low_rank_steps(
    model: nn.Module,
    layers: dict[str, nn.Module],
    batches: Sequence[Batch],
    reduction: Reduction,
    settings: StepSettings,
    consume: Callable[[str, Step], None],
) -> GradientReport:
    """Pass the truncated SVD of each layer's (transformed) mean gradient to ``consume``, the same on every process.

    Each layer is factorised once, by one process, with random numbers that depend on its name.
    Raises ValueError, on every process: see ``mean_gradients``; or a gradient is zero or not finite (the layer is
    named).
    """
    activations = partial(activations_of, model, layers, batches, reduction, checkpointing=settings.checkpointing)
    whole = settings.transform is not None
    holding = how_to_hold(layers, batches, settings.memory, whole=whole, activations=activations)
    steps = Steps(settings, consume)
    if holding.place == "sketch":
        report = sketched_steps(
            model,
            layers,
            batches,
            reduction,
            steps.add_sketched,
            singular_of=settings.singular_of,
            tolerance=settings.tolerance,
            seed=settings.seed,
            checkpointing=settings.checkpointing,
        )
    else:
        for group in grouped(layers, holding.room):
            report = _whole_steps(model, group, batches, reduction, steps, holding.place)
    warn_of_missing_directions(steps.usable, settings)
    return replace(report, memory=holding.place)


@dataclass
class Steps:
    """Collects the steps of all layers; it stores only the number of usable directions of each.

    mine: steps of this process that were not sent to the others yet.  refused: errors not reported to the others yet.
    """

    settings: StepSettings
    consume: Callable[[str, Step], None]
    usable: dict[str, int] = field(default_factory=dict)
    mine: dict[str, Step] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)

    def add(self, name: str, step: Step) -> None:
        """Pass a step that every process has to ``consume``."""
        self.usable[name] = step.usable
        self.consume(name, step)

    def add_sketched(self, name: str, low_rank: LowRank) -> None:
        """Add a step that was computed by ``sketched_steps``."""
        self.add(name, Step.of(filled(name, low_rank, self.settings)))

    def factorise(self, name: str, G: Tensor) -> None:
        """Factorise one layer's gradient on this process; ``share`` raises the errors."""
        try:
            self.mine[name] = factorised(name, G, self.settings)
        except ValueError as error:
            self.refused.append(str(error))

    def share(self, layers: dict[str, nn.Module]) -> None:
        """Add the steps of these layers on every process. Raises ValueError, on every process: see ``factorised``."""
        processes = Processes.current()
        for message in chain.from_iterable(processes.gathered(self.refused)):
            raise ValueError(message)
        for owner, name in processes.by_turns(list(layers)):
            self.add(name, _shared(self.mine.pop(name, None), layers[name], self.settings.singular_of(name), owner))


def _whole_steps(
    model: nn.Module,
    layers: dict[str, nn.Module],
    batches: Sequence[Batch],
    reduction: Reduction,
    steps: Steps,
    place: Place,
) -> GradientReport:
    """Compute the steps of these layers from their whole gradients, in one pass over the batches."""
    checkpointing = steps.settings.checkpointing
    report = mean_gradients(
        model, layers, batches, reduction, steps.factorise, place=place, checkpointing=checkpointing
    )
    steps.share(layers)
    return report


def warn_of_missing_directions(found: Mapping[str, int], settings: StepSettings) -> None:
    """Warn once, on the first process, naming the layers whose gradient has too low a rank."""
    wanted = {name: settings.singular_of(name) for name in found}
    short = [f"{name} ({k} of {wanted[name]})" for name, k in found.items() if k < wanted[name]]
    if short and Processes.current().rank == 0:
        more = f" and {len(short) - 3} more layers" if len(short) > 3 else ""
        warnings.warn(
            f"the gradients of {len(short)} of {len(found)} layers have fewer usable directions than needed: "
            f"{', '.join(short[:3])}{more}. The missing directions are random orthonormal vectors, which do not change "
            "the model's function; to avoid this, use more examples (init.iters) or a lower rank (peft.lora_r)",
            stacklevel=3,
        )


def filled(name: str, low_rank: LowRank, settings: StepSettings) -> LowRank:
    """Replace missing directions by random vectors, the same ones wherever the gradients are stored."""
    return completed(low_rank, generator_for(settings.seed, f"missing directions of {name}"))


def factorised(name: str, G: Tensor, settings: StepSettings) -> Step:
    """Return the truncated SVD of one layer's gradient. Raises ValueError: it is zero or not finite."""
    matrix = settings.transform(G) if settings.transform else G
    generator = generator_for(settings.seed, f"low-rank step of {name}")
    try:
        low_rank = truncated_svd(matrix, settings.singular_of(name), tolerance=settings.tolerance, generator=generator)
    except ValueError as error:
        raise ValueError(f"layer {name}: {error}") from error
    if low_rank.S[0] == 0:
        raise zero_gradient(name)
    low_rank = filled(name, low_rank, settings)
    if settings.transform is None:
        return Step.of(low_rank)
    return Step.of(low_rank, ((low_rank.U.T @ G.to(low_rank.U)) * low_rank.Vh).sum(dim=1))


def _shared(step: Step | None, layer: nn.Module, singular: int, owner: int) -> Step:
    """Return the owner's factorisation, on every process."""
    processes = Processes.current()
    if processes.count == 1:
        return step
    m, n = weight_shape(layer)
    sizes = [m * singular, singular, singular * n, 1, singular]
    device = layer.weight.device
    flat = torch.empty(sum(sizes), device=device)
    if step is not None:
        parts = (step.U.reshape(-1), step.S, step.Vh.reshape(-1), step.S.new_tensor([step.energy]), step.slopes)
        flat = torch.cat([part.float().to(device) for part in parts])
    U, S, Vh, energy, slopes = processes.from_owner(owner, flat).split(sizes)
    return Step(U.view(m, singular), S, Vh.view(singular, n), float(energy), slopes)
