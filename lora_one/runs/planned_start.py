"""The initialisation of a planned run: where its gradients are stored, memory, bytes sent and time."""

from collections.abc import Sequence
from dataclasses import dataclass

from lora_one.initialization.gradients import sum_dtype
from lora_one.initialization.holding import (
    FREE_SHARE,
    SKETCH_PASSES,
    SPEEDS,
    Holding,
    Memory,
    fastest,
    packed,
    place_of,
    room_beside,
)
from lora_one.initialization.moments import group_bytes, groups_of_passes
from lora_one.initialization.search import EVALUATIONS
from lora_one.initialization.sketch import PROBES
from lora_one.linalg import OVERSAMPLING
from lora_one.runs import traffic
from lora_one.runs.planned_run import PlannedRun
from lora_one.runs.rank_memory import LOSS, forward_rows, held_bytes
from lora_one.runs.traffic import Traffic

Groups = Sequence[Sequence[str]]  # names of layers with the same input


@dataclass(frozen=True)
class PlannedStart:
    """The initialisation on each process.

    place: where the gradients are stored.  memory: bytes on the device.  passes: over all examples.
    sent: in collective operations.  seconds: without the decompositions of the gradients; None: without hardware.
    """

    place: str
    memory: float
    passes: int
    sent: Traffic
    seconds: float | None


@dataclass(frozen=True)
class Stored:
    """The gradients of an initialisation: their place, bytes on the device, passes over the examples, and traffic.

    sums: bytes that grow in each backward pass, when activations are freed, and stay until the last one.
    other: bytes during all passes.
    """

    place: str
    sums: float
    other: float
    passes: int
    sent: Traffic


def planned_start(planned: PlannedRun, processes: int, memory: Memory | None, groups: Groups) -> PlannedStart | None:
    """Return the plan of an initialisation that uses examples; None: without hardware, memory=auto is not known.

    memory: where the gradients are stored (``init.memory``); None: the method has no such setting.
    groups: only for a method that uses second moments.
    """
    init, hardware = planned.run.init, planned.hardware
    rows = 1 if init.needs_moments else init.bsz or planned.run.model.per_device_batch_size
    length = init.max_length or planned.run.model.max_length
    wanted = init.examples_wanted or planned.examples
    batches = -(-wanted // rows)
    activations = min(rows, wanted) * planned.example(length)
    stored = stored_gradients(planned, processes, memory, batches, wanted * length, activations, groups)
    if stored is None:
        return None
    alike = stored.place == "layer" or not init.needs_gradient  # every process uses all batches
    mine = batches if alike else -(-batches // processes)
    passes = stored.passes * mine
    if mine > 1:
        in_passes = activations + stored.sums
    else:  # at the end of the only backward pass there are no activations, and no block is gathered in advance
        in_passes = max(activations, stored.sums - (planned.copies / 2 if planned.run.model.sharded else 0))
    # then the loss with the factors, without gradients
    together = forward_rows(wanted, length, planned.outputs, processes)
    after = LOSS * together * length * planned.outputs
    at_once = together * processes
    trials = 0 if init.search_from is None else EVALUATIONS
    forward = -(-wanted // at_once) + trials * -(-(planned.run.further_examples or wanted) // at_once)
    base = planned.base * bool(planned.run.model.sharded)
    seconds = None
    if hardware is not None:
        adapted = sum(m * n for m, n in planned.shapes)
        weights, efficiency = planned.weights, hardware.initialisation_efficiency
        each = planned.pass_seconds(rows * length * (4 * weights + 2 * adapted), 2, 2, processes, efficiency)
        last = planned.pass_seconds(2 * together * length * weights, 1, 1, processes, efficiency)
        seconds = passes * each + forward * last + stored.sent.sent(processes) / hardware.link(processes)
    return PlannedStart(
        place=stored.place,
        memory=planned.resident(processes) + 2 * planned.factors() + max(stored.other + in_passes, after),
        passes=stored.passes,
        sent=stored.sent + Traffic(gathered=base * (2 * passes + forward)),
        seconds=seconds,
    )


def stored_gradients(
    planned: PlannedRun,
    processes: int,
    memory: Memory | None,
    batches: int,
    tokens: int,
    activations: float,
    groups: Groups,
) -> Stored | None:
    """Return how the gradients are stored; None: it is not known without hardware.

    tokens: of all batches.  activations: bytes of a pass over a batch.
    """
    init, shapes = planned.run.init, planned.shapes
    itemsize = sum_dtype(planned.skeleton, planned.layers).itemsize
    if init.needs_moments:
        return stored_moments(planned, processes, memory, activations, groups)
    if not init.needs_gradient:  # PEFT's code, on every process
        return Stored("device", 4 * sum(m * n for m, n in shapes) * init.gradient_by_peft, 0, 1, Traffic())
    holding = holding_of(planned, processes, memory, batches, tokens, activations)
    if holding is None:
        return None
    singular = init.vectors * planned.run.peft.lora_r
    held = held_bytes(holding.place, shapes, singular, itemsize, holding.room)  # sums, and other
    if holding.place == "sketch":
        sent = traffic.summed_sketches(shapes, singular + OVERSAMPLING, PROBES, itemsize, SKETCH_PASSES)
        return Stored("sketch", *held, SKETCH_PASSES, sent)
    sent = traffic.chosen_ranks(shapes, init.max_rank) if init.sets_ranks else traffic.shared_steps(shapes, singular)
    if holding.place != "layer":
        sent += traffic.summed_gradients(shapes, itemsize)
    passes = 1 if holding.room is None else len(packed([4 * m * n for m, n in shapes], holding.room))
    return Stored(holding.place, *held, passes, sent)


def stored_moments(
    planned: PlannedRun, processes: int, memory: Memory, activations: float, groups: Groups
) -> Stored | None:
    """Return how second moments are stored; None: it is not known without hardware."""
    layers, dtype = planned.layers, sum_dtype(planned.skeleton, planned.layers)
    shapes = dict(zip(layers, planned.shapes, strict=True))
    inputs = [shapes[group[0]][1] for group in groups]
    sizes = [group_bytes([layers[name] for name in group], dtype) for group in groups]
    sent = traffic.summed_moments(planned.shapes, inputs, planned.run.peft.lora_r, dtype.itemsize)
    if memory == "auto" and planned.hardware is None:
        return None
    parts = groups_of_passes(
        sizes, memory, lambda: room_beside(sum(sizes), planned.free(processes), lambda: activations)
    )
    return Stored("device", max(sum(sizes[index] for index in part) for part in parts), 0, len(parts), sent)


def holding_of(
    planned: PlannedRun, processes: int, memory: Memory, batches: int, tokens: int, activations: float
) -> Holding | None:
    """Return where whole gradients are stored, as ``how_to_hold`` would choose; None: not known without hardware."""
    init, hardware = planned.run.init, planned.hardware
    whole = init.transform is not None or init.sets_ranks
    fixed = place_of(batches, memory, processes, whole=whole)
    if fixed is not None or hardware is None:
        return None if fixed is None else Holding(fixed)
    sizes = [4 * m * n for m, n in planned.shapes]
    return fastest(
        -(-batches // processes),
        tokens // processes,
        sizes,
        device_room=room_beside(sum(sizes), planned.free(processes), lambda: activations),
        host_room=int(FREE_SHARE * hardware.host_memory / min(processes, hardware.devices_per_node)),
        speed=SPEEDS["cuda"],
        whole=whole,
    )
