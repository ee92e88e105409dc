"""The low-rank step of every target layer: mean gradient in, truncated SVD out, in as little memory as is wanted."""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal

import psutil
import torch
from torch import Tensor, nn

from lora_one.distributed import Processes
from lora_one.initialization.gradients import GradientReport, mean_gradients, without_autocast
from lora_one.initialization.sketch import sketched_steps
from lora_one.linalg import LowRank, completed, truncated_svd
from lora_one.losses import Batch, Reduction
from lora_one.models import weight_shape
from lora_one.seeding import generator_for

Memory = Literal["auto", "fast", "low"]
FREE_SHARE = 0.5  # of the free memory that all gradients together may take
SKETCH_PASSES = 11  # as Gemma 3 270M takes on 8 examples at r = 8; a flat spectrum takes 17


@dataclass(frozen=True)
class Speed:
    """Rough figures of a device and its host: flop/s of a pass, bytes/s of the link and of the host's memory."""

    flops: float
    link: float = 2e10
    host: float = 2e10


SPEEDS = {"cuda": Speed(flops=2e14), "cpu": Speed(flops=5e10)}


@dataclass(frozen=True)
class Step(LowRank):
    """The low-rank step of a gradient G.

    slopes: (r,) u_i^T G v_i, what the loss changes by to first order for each unit of u_i v_i^T; S unless transformed.
    Where G has fewer than r directions above the rounding errors, the other S_i are exactly 0 and their vectors random
    (``linalg.completed``).
    """

    slopes: Tensor

    @property
    def usable(self) -> int:
        """Directions above the rounding errors."""
        return int((self.S > 0).sum())

    @classmethod
    def of(cls, low_rank: LowRank, slopes: Tensor | None = None) -> "Step":
        return cls(**vars(low_rank), slopes=low_rank.S if slopes is None else slopes)


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """singular: values to keep, of every layer or by its name.  transform: of G, before the SVD (None: G itself).

    memory: see ``how_to_hold``.
    """

    singular: int | Mapping[str, int] = 8
    tolerance: float = 1e-3
    seed: int = 0
    memory: Memory = "auto"
    transform: Callable[[Tensor], Tensor] | None = None
    checkpointing: bool = False

    def singular_of(self, name: str) -> int:
        return self.singular if isinstance(self.singular, int) else self.singular[name]


@without_autocast()
def low_rank_steps(
    model: nn.Module,
    layers: dict[str, nn.Module],
    batches: Sequence[Batch],
    reduction: Reduction,
    settings: StepSettings,
    consume: Callable[[str, Step], None],
) -> GradientReport:
    """Hand the truncated SVD of each layer's (transformed) mean gradient to ``consume``, the same on every process.

    Each layer is factorised once, on one process, with random numbers of its own name.
    Raises ValueError, on every process: as ``mean_gradients``; a gradient that is zero or not finite (the layer is
    named).
    """
    holding = how_to_hold(layers, batches, settings)
    found: dict[str, int] = {}  # usable directions by layer

    def hand_over(name: str, step: Step) -> None:
        found[name] = step.usable
        consume(name, step)

    if holding.place == "sketch":
        report = sketched_steps(
            model,
            layers,
            batches,
            reduction,
            lambda name, low_rank: hand_over(name, Step.of(filled(name, low_rank, settings))),
            singular_of=settings.singular_of,
            tolerance=settings.tolerance,
            seed=settings.seed,
            checkpointing=settings.checkpointing,
        )
    else:
        for group in grouped(layers, holding.room):
            report = _whole_steps(model, group, batches, reduction, settings, hand_over, hold=holding.place)
    warn_of_missing_directions(found, settings)
    return replace(report, memory=holding.place)


def _whole_steps(
    model: nn.Module,
    layers: dict[str, nn.Module],
    batches: Sequence[Batch],
    reduction: Reduction,
    settings: StepSettings,
    consume: Callable[[str, Step], None],
    *,
    hold: str,
) -> GradientReport:
    """The steps of these layers from whole gradients, by one pass over the batches."""
    processes = Processes.current()
    mine: dict[str, Step] = {}
    refused: list[str] = []

    def factorise(name: str, G: Tensor) -> None:
        try:
            mine[name] = factorised(name, G, settings)
        except ValueError as error:  # the other processes are to hear of it, or they would wait for this layer
            refused.append(str(error))

    report = mean_gradients(
        model, layers, batches, reduction, factorise, hold=hold, checkpointing=settings.checkpointing
    )
    for message in chain.from_iterable(processes.gathered(refused)):
        raise ValueError(message)
    for owner, name in processes.by_turns(list(layers)):
        consume(name, _shared(mine.pop(name, None), layers[name], settings.singular_of(name), owner))
    return report


def warn_of_missing_directions(found: Mapping[str, int], settings: StepSettings) -> None:
    """Warn once, on the first process, naming the layers whose gradient has too low a rank."""
    wanted = {name: settings.singular_of(name) for name in found}
    short = [f"{name} ({k} of {wanted[name]})" for name, k in found.items() if k < wanted[name]]
    if short and Processes.current().rank == 0:
        more = f" and {len(short) - 3} more" if len(short) > 3 else ""
        warnings.warn(
            f"the gradients of {len(short)} of {len(found)} layers have fewer usable directions than wanted: "
            f"{', '.join(short[:3])}{more}. The missing ones start at random orthonormal vectors that do not change "
            "the model's function; take more examples (init.iters) or a lower rank (peft.lora_r)",
            stacklevel=3,
        )


def filled(name: str, low_rank: LowRank, settings: StepSettings) -> LowRank:
    """The same vectors in place of missing directions in every memory mode."""
    return completed(low_rank, generator_for(settings.seed, f"missing directions of {name}"))


def factorised(name: str, G: Tensor, settings: StepSettings) -> Step:
    """Truncated SVD of one layer's gradient. Raises ValueError: zero or not finite."""
    matrix = settings.transform(G) if settings.transform else G
    generator = generator_for(settings.seed, f"low-rank step of {name}")
    try:
        low_rank = truncated_svd(matrix, settings.singular_of(name), tolerance=settings.tolerance, generator=generator)
    except ValueError as error:
        raise ValueError(f"layer {name}: {error}") from error
    if low_rank.S[0] == 0:
        raise ValueError(f"the gradient of layer {name} is zero: nothing to start from")
    low_rank = filled(name, low_rank, settings)
    if settings.transform is None:
        return Step.of(low_rank)
    return Step.of(low_rank, ((low_rank.U.T @ G.to(low_rank.U)) * low_rank.Vh).sum(dim=1))


@dataclass(frozen=True)
class Holding:
    """Where gradients wait until the last batch.

    place: "layer" (one at a time, inside the backward pass), "device", "cpu" (copies on the host) or "sketch" (never
    whole).  room: bytes of gradients at once on the device; what exceeds it takes further passes (None: all at once).
    """

    place: str
    room: int | None = None


def how_to_hold(layers: dict[str, nn.Module], batches: Sequence[Batch], settings: StepSettings) -> Holding:
    """The place for the gradients of all layers, the same on every process: the one with the least room decides.

    memory=fast: on the device.  low: one at a time where the examples fit one batch, else sketched (a transform
    needs G whole, so then on the CPU).  auto: one at a time for one batch, else the ``fastest``.
    """
    processes = Processes.current()
    if len(batches) == 1:
        return Holding("device" if settings.memory == "fast" and processes.count == 1 else "layer")
    if settings.memory == "fast":
        return Holding("device")
    whole = settings.transform is not None
    if settings.memory == "low":
        return Holding("cpu" if whole else "sketch")
    device = next(iter(layers.values())).weight.device
    host = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes share it
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host
    free, host = (min(rooms) for rooms in zip(*processes.gathered((free, host)), strict=True))
    sizes = [gradient_bytes(layer) for layer in layers.values()]
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    return fastest(
        -(-len(batches) // processes.count),
        tokens // processes.count,
        sizes,
        device_room=int(FREE_SHARE * free),
        host_room=int(FREE_SHARE * host) if device.type != "cpu" else 0,
        speed=SPEEDS.get(device.type, SPEEDS["cpu"]),
        whole=whole,
    )


def fastest(
    batches: int,
    tokens: int,
    sizes: Sequence[int],
    *,
    device_room: int,
    host_room: int,
    speed: Speed,
    whole: bool,
) -> Holding:
    """The way to hold several batches' gradients with the least predicted time, of those that there is room for.

    A pass takes 6 flop for each weight and token. With N bytes of gradients:
    device: one pass for each group of layers that fits into the room there, so one where all do.
    cpu: one pass, and N bytes over the link, read and added on the host for each batch.
    sketch: ``SKETCH_PASSES`` passes; not where G is needed ``whole``.
    Rough figures are enough: what they decide between differs by factors. Every way gives the same step.

    sizes: bytes of each layer's gradient, fp32.  batches, tokens: of one process.
    """
    one_pass = 6 * sum(sizes) / 4 * tokens / speed.flops
    seconds: dict[str, float] = {}
    if max(sizes) <= device_room:
        seconds["device"] = len(_groups(sizes, device_room)) * one_pass
    if sum(sizes) <= host_room:
        seconds["cpu"] = one_pass + batches * sum(sizes) * (1 / speed.link + 3 / speed.host)
    if not whole:
        seconds["sketch"] = SKETCH_PASSES * one_pass
    place = min(seconds, key=seconds.__getitem__, default="cpu")
    return Holding(place, device_room if place == "device" and sum(sizes) > device_room else None)


def gradient_bytes(layer: nn.Module) -> int:
    m, n = weight_shape(layer)
    return 4 * m * n


def grouped(layers: dict[str, nn.Module], room: int | None) -> list[dict[str, nn.Module]]:
    """The layers in groups, in order, whose gradients fit into the room together."""
    if room is None:
        return [layers]
    names = list(layers)
    return [
        {names[index]: layers[names[index]] for index in group}
        for group in _groups([gradient_bytes(layer) for layer in layers.values()], room)
    ]


def _groups(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Indices of consecutive sizes that add up to at most ``room``, a larger one alone."""
    groups: list[list[int]] = []
    filled_to = 0
    for index, size in enumerate(sizes):
        if not groups or filled_to + size > room:
            groups.append([])
            filled_to = 0
        groups[-1].append(index)
        filled_to += size
    return groups


def _shared(step: Step | None, layer: nn.Module, singular: int, owner: int) -> Step:
    """The owner's factorisation, everywhere."""
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
