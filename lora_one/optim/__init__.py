"""Build an optimiser by its name; the scaled ones precondition the gradients of the LoRA factors."""

import dataclasses
import importlib
from typing import TYPE_CHECKING

import torch
from torch import nn

from lora_one.optim.adamw import AdamW
from lora_one.optim.param_groups import param_groups
from lora_one.optim.scaled import create_scaled_optimizer

if TYPE_CHECKING:
    from lora_one.config import RunConfig

__all__ = ["AdamW", "build_optimizer", "create_scaled_optimizer"]


def build_optimizer(model: nn.Module, run: "RunConfig") -> torch.optim.Optimizer:
    """Return the optimizer that ``optimizer.name`` names, over the trainable parameters of the model.

    The other keys of ``optimizer`` are its arguments. Raises UsageError: see `param_groups`, `create_scaled_optimizer`.
    """
    groups = param_groups(model, run.model.learning_rate, run.model.weight_decay, run.peft)
    on_gpu = any(parameter.is_cuda for group in groups for parameter in group["params"])
    options = dataclasses.asdict(run.optimizer) | {"lr": run.model.learning_rate, "fused": on_gpu}
    del options["name"]
    module, _, name = run.optimizer.implementation.rpartition(".")
    chosen = getattr(importlib.import_module(module), name)
    if run.optimizer.preconditioned:
        return create_scaled_optimizer(model, chosen, reg=run.model.prec_reg, params=groups, **options)
    return chosen(groups, **options)
