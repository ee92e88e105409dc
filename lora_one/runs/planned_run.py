"""A run with one variant of its base, planned for any number of processes: memory, bytes sent and time of training."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from lora_one.config import RunConfig
from lora_one.config.hardware import Hardware
from lora_one.models import DTYPES, weight_shape
from lora_one.runs import rank_memory
from lora_one.runs.memory_forecast import state_bytes
from lora_one.runs.traffic import Shapes, Traffic, training_begin, training_step
from lora_one.training.schedule import accumulation_steps, micro_batch


@dataclass(frozen=True)
class PlannedRun:
    """What the memory and the time of a run depend on; every example has the maximum length.

    layers: the adapted ones; {}: every weight is trained.  examples: of training.
    kept: returns the bytes of an example's activations, by its length and the dtype of the products.
    hardware: None: times are not known.
    """

    run: RunConfig
    skeleton: nn.Module
    layers: dict[str, nn.Module]
    trainable: int
    examples: int
    kept: Callable[[int, torch.dtype], int]
    hardware: Hardware | None

    @cached_property
    def shapes(self) -> Shapes:
        return [weight_shape(layer) for layer in self.layers.values()]

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the products of matrices."""
        return DTYPES["bf16" if self.run.model.bf16 else "fp32"]

    @property
    def outputs(self) -> int:
        """Return the number of logits for each token; a classification head has too few to count."""
        return 0 if self.run.model.kind.has_head else self.skeleton.config.get_text_config().vocab_size

    @cached_property
    def weights(self) -> int:
        """Return how many weights each token is multiplied by."""
        return rank_memory.multiplied(self.skeleton)

    @cached_property
    def base(self) -> float:
        """Return the bytes of the whole base."""
        dtype = self.dtype if self.layers else torch.float32
        return rank_memory.stored_bytes(self.skeleton, dtype, self.run.model.quantization)

    @cached_property
    def copies(self) -> int:
        """Return the bytes of the parts of the base that a pass needs a copy of: gathered, or dequantised."""
        if self.run.model.sharded:
            return rank_memory.gathered_bytes(self.skeleton, self.dtype)
        return rank_memory.dequantised_bytes(self.skeleton, self.dtype) if self.run.model.quantization else 0

    def resident(self, processes: int) -> float:
        """Return the bytes of the base on each process, with the copies that a pass needs."""
        return self.base / self.run.model.shards(processes) + self.copies

    def free(self, processes: int) -> float:
        """Return the bytes of a device that are free once the base is loaded."""
        return max(0.0, self.hardware.room - self.resident(processes))

    def factors(self) -> int:
        """Return the bytes of the factors of all adapters, fp32."""
        return 4 * self.run.peft.lora_r * sum(m + n for m, n in self.shapes)

    def example(self, length: int) -> int:
        """Return what one example keeps in a pass without adapters: activations and what the loss needs."""
        return self.kept(length, self.dtype) + rank_memory.LOSS * length * self.outputs

    def training_memory(self, processes: int) -> float:
        """Return the largest number of bytes of each process in training."""
        model, peft = self.run.model, self.run.peft
        each = self.example(model.max_length)
        if self.layers and peft.lora_dropout:
            each += rank_memory.dropout_bytes(self.shapes, model.max_length, self.dtype)
        in_steps = state_bytes(self.run.optimizer, self.trainable, self.shapes)
        in_steps += micro_batch(model, processes) * each
        at_first = 4 * self.trainable
        if processes > 1:
            in_steps += 4 * self.trainable  # the buffers in which DDP sends the gradients
            at_first += min(rank_memory.SENT_AT_ONCE, 4 * self.trainable)
        frozen = self.factors() if peft.lora_xs else 0
        return self.resident(processes) + frozen + max(in_steps, at_first)

    def begin_traffic(self) -> Traffic:
        """Return the bytes in collective operations before the first step."""
        return training_begin(self.trainable)

    def step_traffic(self, processes: int) -> Traffic:
        """Return the bytes of one optimizer step in collective operations."""
        gathered = self.base if self.run.model.sharded else 0
        return training_step(self.trainable, gathered, accumulation_steps(self.run.model, processes))

    def sent(self, traffic: Traffic, processes: int) -> float:
        """Return the bytes that each process sends; a sharded base is gathered from those that share a copy of it."""
        return traffic.sent(processes, self.run.model.shards(processes))

    def step_seconds(self, processes: int) -> float:
        """Return the seconds of one optimizer step: passes, then the sum of the gradients."""
        model = self.run.model
        tokens = model.max_length * micro_batch(model, processes)
        again = 1 if model.gradient_checkpointing else 0
        # forward and backward; adapters, or all weights, also get a gradient of their own
        own = 6 * self.trainable if self.layers else 2 * self.weights
        passes = self.pass_seconds(
            tokens * ((4 + 2 * again) * self.weights + own), 2 + again, 2, processes, self.hardware.training_efficiency
        )
        summed = training_step(self.trainable, 0, 0).sent(processes) / self.hardware.link(processes)
        return accumulation_steps(model, processes) * passes + summed

    def pass_seconds(self, flops: float, reads: int, gatherings: int, processes: int, efficiency: float) -> float:
        """Return the seconds of some passes: the slowest of computing, reading the weights and gathering them.

        The three overlap. reads: how often every weight is read; a quantised one is also written and read in the dtype
        of the products.  gatherings: how often a sharded base is gathered.
        """
        hardware, moved, shards = self.hardware, self.base, self.run.model.shards(processes)
        if self.run.model.quantization:
            moved += 2 * self.dtype.itemsize * self.weights
        peak = hardware.bf16_flops if self.dtype == torch.bfloat16 else hardware.fp32_flops
        gathered = Traffic(gathered=gatherings * self.base * bool(self.run.model.sharded))
        return max(
            flops / (peak * efficiency),
            reads * moved / hardware.memory_bandwidth,
            # within a node only if no group of shards is on two of them
            self.sent(gathered, processes) / hardware.link(processes if hardware.devices_per_node % shards else shards),
        )
