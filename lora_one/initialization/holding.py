"""Choose where the gradients of all layers are stored until the last batch: a trade-off between time and memory."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import psutil
import torch
from torch import nn

from lora_one.distributed import Processes
from lora_one.losses import Batch
from lora_one.models import free_bytes, weight_shape

Memory = Literal["auto", "fast", "low"]  # the setting init.memory
Place = Literal["layer", "device", "cpu", "sketch"]  # the place that is chosen; see ``Holding``
FREE_SHARE = 0.5  # largest share of the free memory for all gradients together
REST_SHARE = 0.75  # and of the memory that the activations leave
SMALL_SHARE = 0.125  # gradients up to this share of the free memory fit beside any activations
SKETCH_PASSES = 11  # measured with Gemma 3 270M, 8 examples and r = 8; a flat spectrum needs 17


@dataclass(frozen=True)
class Holding:
    """Where gradients are stored until the last batch.

    place     in memory                                            passes over the batches
    layer     one G at a time, on the model's device               one, over a single batch
    device    every G of a group of layers, on the model's device  one for each group
    cpu       every G, on the host                                 one
    sketch    products of G with thin matrices                     about SKETCH_PASSES

    room: limit in bytes for the gradients of a group on the device; None: all layers are one group.
    """

    place: Place
    room: int | None = None


@dataclass(frozen=True)
class Speed:
    """Approximate speed of a device and its host: flop/s of a pass, bytes/s of the link and of the host's memory."""

    flops: float
    link: float = 2e10
    host: float = 2e10


SPEEDS = {"cuda": Speed(flops=2e14), "cpu": Speed(flops=5e10)}


def how_to_hold(
    layers: dict[str, nn.Module],
    batches: Sequence[Batch],
    memory: Memory,
    *,
    whole: bool,
    activations: Callable[[], int],
) -> Holding:
    """Choose the place for the gradients of all layers, the same on every process: the smallest free memory decides.

    whole: a transform needs the whole G.
    activations: returns the bytes that a pass over a batch needs beside them; called on every process or on none.
    memory=fast: on the device.  low: layer by layer for one batch; otherwise as a sketch, or on the CPU if G is needed
    whole.  auto: layer by layer for one batch; otherwise the ``fastest`` place.
    """
    processes = Processes.current()
    fixed = place_of(len(batches), memory, processes.count, whole=whole)
    if fixed is not None:
        return Holding(fixed)
    device = next(iter(layers.values())).weight.device
    free, host = least_free(device)
    sizes = [gradient_bytes(layer) for layer in layers.values()]
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    return fastest(
        -(-len(batches) // processes.count),
        tokens // processes.count,
        sizes,
        device_room=common_room(sum(sizes), free, activations),
        host_room=int(FREE_SHARE * host) if device.type != "cpu" else 0,
        speed=SPEEDS.get(device.type, SPEEDS["cpu"]),
        whole=whole,
    )


def least_free(device: torch.device) -> tuple[int, int]:
    """Return the free bytes of the device, and of the host for each of its processes: the smallest of all processes."""
    host = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes share it
    free = free_bytes(device) if device.type == "cuda" else host
    devices, hosts = zip(*Processes.current().gathered((free, host)), strict=True)
    return min(devices), min(hosts)


def common_room(wanted: int, free: int, activations: Callable[[], int]) -> int:
    """Return ``room_beside`` with the largest activations of all processes, which must call this with equal values."""
    return room_beside(wanted, free, lambda: max(Processes.current().gathered(activations())))


def room_beside(wanted: int, free: float, activations: Callable[[], float]) -> int:
    """Return the bytes that gradients may take on the device beside the activations of a pass.

    wanted: bytes of all gradients.  free: memory after loading.  activations: called unless ``wanted`` is small.
    """
    half = FREE_SHARE * free
    return int(half if wanted <= SMALL_SHARE * free else max(0, min(half, REST_SHARE * (free - activations()))))


def place_of(batches: int, memory: Memory, processes: int, *, whole: bool) -> Place | None:
    """Return the place for this number of batches, if it does not depend on the free memory; None: it does."""
    if batches == 1:
        return "device" if memory == "fast" and processes == 1 else "layer"
    if memory == "fast":
        return "device"
    if memory == "low":
        return "cpu" if whole else "sketch"
    return None


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
    """Return the place with the shortest predicted time for several batches, among those with enough memory.

    A pass takes 6 flop for each weight and token. With N bytes of gradients:
    device: one pass for each group of layers that fits into ``device_room``.
    cpu: one pass; for each batch, N bytes are copied over the link and added on the host.
    sketch: ``SKETCH_PASSES`` passes; not possible if G is needed ``whole``.
    Approximate figures are enough, because the times differ by factors. Every place gives the same step.

    sizes: bytes of each layer's gradient, fp32.  batches, tokens: numbers of one process.
    """
    one_pass = 6 * sum(sizes) / 4 * tokens / speed.flops
    seconds: dict[Place, float] = {}
    if max(sizes) <= device_room:
        seconds["device"] = len(packed(sizes, device_room)) * one_pass
    if sum(sizes) <= host_room:
        seconds["cpu"] = one_pass + batches * sum(sizes) * (1 / speed.link + 3 / speed.host)
    if not whole:
        seconds["sketch"] = SKETCH_PASSES * one_pass
    place = min(seconds, key=seconds.__getitem__, default="cpu")
    return Holding(place, device_room if place == "device" and sum(sizes) > device_room else None)


def gradient_bytes(layer: nn.Module) -> int:
    """Return the bytes of a layer's gradient in fp32."""
    m, n = weight_shape(layer)
    return 4 * m * n


def grouped(layers: dict[str, nn.Module], room: int | None) -> list[dict[str, nn.Module]]:
    """Return the layers, in order, in groups whose gradients fit into ``room`` bytes; None: one group."""
    if room is None:
        return [layers]
    names = list(layers)
    return [
        {names[index]: layers[names[index]] for index in group}
        for group in packed([gradient_bytes(layer) for layer in layers.values()], room)
    ]


def packed(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Return indices in consecutive groups whose sizes add up to at most ``room``; a larger size is a group alone."""
    groups: list[list[int]] = []
    filled_to = 0
    for index, size in enumerate(sizes):
        if not groups or filled_to + size > room:
            groups.append([])
            filled_to = 0
        groups[-1].append(index)
        filled_to += size
    return groups
