"""Where the gradients of all layers wait until the last batch: a choice between time and memory."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import psutil
import torch
from torch import nn

from lora_one.distributed import Processes
from lora_one.losses import Batch
from lora_one.models import weight_shape

Memory = Literal["auto", "fast", "low"]  # what the user asks for
Place = Literal["layer", "device", "cpu", "sketch"]  # what it becomes; see ``Holding``
FREE_SHARE = 0.5  # of the free memory that all gradients together may take
SKETCH_PASSES = 11  # as Gemma 3 270M takes on 8 examples at r = 8; a flat spectrum takes 17


@dataclass(frozen=True)
class Holding:
    """Where gradients wait until the last batch.

    place     what is in memory                        passes over the batches
    layer     one G at a time, on the model's device   one, over a single batch
    device    every G of a group of layers, there      one for each group
    cpu       every G, as a copy on the host           one
    sketch    products of G with thin matrices         about SKETCH_PASSES

    room: bytes of gradients at once on the device; what exceeds it needs further passes (None: all at once).
    """

    place: Place
    room: int | None = None


@dataclass(frozen=True)
class Speed:
    """Rough figures of a device and its host: flop/s of a pass, bytes/s of the link and of the host's memory."""

    flops: float
    link: float = 2e10
    host: float = 2e10


SPEEDS = {"cuda": Speed(flops=2e14), "cpu": Speed(flops=5e10)}


def how_to_hold(layers: dict[str, nn.Module], batches: Sequence[Batch], memory: Memory, *, whole: bool) -> Holding:
    """Choose the place for the gradients of all layers, the same on every process: the least free memory decides.

    whole: G is needed as a whole, for a transform.
    memory=fast: on the device.  low: layer by layer where the examples fit one batch, else as a sketch, or on the CPU
    where G is needed whole.  auto: layer by layer for one batch, else the ``fastest`` place.
    """
    processes = Processes.current()
    if len(batches) == 1:
        return Holding("device" if memory == "fast" and processes.count == 1 else "layer")
    if memory == "fast":
        return Holding("device")
    if memory == "low":
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
    """Return the place with the least predicted time for several batches' gradients, of those with enough room.

    A pass takes 6 flop for each weight and token. With N bytes of gradients:
    device: one pass for each group of layers that fits into the room there, so one where all do.
    cpu: one pass, and N bytes over the link, read and added on the host for each batch.
    sketch: ``SKETCH_PASSES`` passes; not where G is needed ``whole``.
    Rough figures are enough, because the times differ by factors. Every place gives the same step.

    sizes: bytes of each layer's gradient, fp32.  batches, tokens: of one process.
    """
    one_pass = 6 * sum(sizes) / 4 * tokens / speed.flops
    seconds: dict[Place, float] = {}
    if max(sizes) <= device_room:
        seconds["device"] = len(_groups(sizes, device_room)) * one_pass
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
    """Return the layers in groups, in order, whose gradients fit into the room together; None: one group."""
    if room is None:
        return [layers]
    names = list(layers)
    return [
        {names[index]: layers[names[index]] for index in group}
        for group in _groups([gradient_bytes(layer) for layer in layers.values()], room)
    ]


def _groups(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Return indices of consecutive sizes that add up to at most ``room``; a larger size is alone."""
    groups: list[list[int]] = []
    filled_to = 0
    for index, size in enumerate(sizes):
        if not groups or filled_to + size > room:
            groups.append([])
            filled_to = 0
        groups[-1].append(index)
        filled_to += size
    return groups
