"""Optimisers by name, over parameter groups that LoRA+ may split."""

from typing import Any

import torch
from torch import nn

from lora_one.config import RunConfig
from lora_one.optim.param_groups import param_groups


def build_optimizer(model: nn.Module, run: RunConfig) -> torch.optim.Optimizer:
    """The optimiser that ``optimizer.name`` names, over the trainable parameters of the model."""
    groups = param_groups(model, run.model.learning_rate, run.model.weight_decay, run.peft)
    on_gpu = any(parameter.is_cuda for group in groups for parameter in group["params"])
    options: dict[str, Any] = {"lr": run.model.learning_rate, "fused": on_gpu}
    if run.optimizer.name == "sgd":
        return torch.optim.SGD(groups, momentum=run.optimizer.momentum, **options)
    return torch.optim.AdamW(groups, betas=tuple(run.optimizer.betas), eps=run.optimizer.eps, **options)
