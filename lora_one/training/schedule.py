"""The number of optimizer steps of a training, and what depends on it."""

import math

from lora_one.config.rules import largest_divisor
from lora_one.config.schemas import ModelConfig
from lora_one.errors import UsageError


def micro_batch(model: ModelConfig, processes: int) -> int:
    """Return the examples that each process computes at once.

    It is the largest number up to ``per_device_batch_size`` that divides the share of a process of a global batch; it
    changes speed and memory only.
    Raises UsageError: the global batch cannot be divided evenly among the processes.
    """
    share, rest = divmod(model.real_batch_size, processes)
    if rest or not share:
        raise UsageError(
            f"model.real_batch_size={model.real_batch_size} is not divisible by {processes} processes: set it to a "
            f"multiple of {processes}, or start {largest_divisor(model.real_batch_size, processes)}"
        )
    return largest_divisor(share, min(model.per_device_batch_size, share))


def accumulation_steps(model: ModelConfig, processes: int) -> int:
    """Return the micro-batches per optimizer step of each process; ``real_batch_size`` is over all processes.

    Raises UsageError: see ``micro_batch``.
    """
    return model.real_batch_size // (micro_batch(model, processes) * processes)


def steps_per_epoch(examples: int, model: ModelConfig) -> int:
    """Return the optimizer steps of one epoch; the last step may have a smaller batch."""
    return math.ceil(examples / model.real_batch_size)


def total_steps(examples: int, model: ModelConfig) -> int:
    """Return the optimizer steps of the whole training."""
    # rounded first: 1.1 * 50 is 55.00000000000001
    return math.ceil(round(model.epochs * steps_per_epoch(examples, model), 9))


def warmup_steps(examples: int, model: ModelConfig) -> int:
    """Return the optimizer steps of the warm-up, as the Trainer counts them."""
    return int(model.warmup) if model.warmup >= 1 else math.ceil(model.warmup * total_steps(examples, model))


def refuse_no_learning(examples: int, model: ModelConfig) -> None:
    """Raise UsageError if the only step is the first of a warm-up, at learning rate 0, or no step is after it."""
    steps, warmup = total_steps(examples, model), warmup_steps(examples, model)
    if warmup > steps > 1:
        raise UsageError(
            f"model.warmup={model.warmup:g} is more than the {steps} steps of this run, so the learning rate would "
            "never reach model.learning_rate: set it to fewer steps, or to a share of them, such as 0.03"
        )
    if steps == 1 and warmup >= 1:
        raise UsageError(
            f"model.warmup={model.warmup:g} starts with learning rate 0, and this run has only one step, so it would "
            "train nothing: set model.warmup=0, or train for more steps (model.epochs, model.real_batch_size)"
        )


def refuse_idle(examples: int, processes: int) -> None:
    """Raise UsageError if there are more processes than training examples, so that some would never get one."""
    if processes > examples:
        raise UsageError(
            f"{processes} processes are more than the {examples} training examples: start at most {examples}, or use "
            "more examples"
        )


def first_step_size(examples: int, model: ModelConfig) -> float:
    """Return the learning rate of the first warm-up step: learning_rate / warm-up steps.

    This is eta of arXiv:2411.19557. It counts optimizer steps; the published code counts micro-batches, which makes
    eta many times too small.
    """
    return model.learning_rate / max(1, warmup_steps(examples, model))
