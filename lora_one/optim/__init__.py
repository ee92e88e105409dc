"""Build an optimizer by its name. Some precondition the gradients of the factors, some step both factors together."""

import dataclasses
from typing import TYPE_CHECKING

from torch import nn
from torch.optim import Optimizer

from lora_one.optim.adamw import AdamW
from lora_one.optim.lora_muon import LoraMuon
from lora_one.optim.lora_pro import LoraPro
from lora_one.optim.lora_rite import LoraRite
from lora_one.optim.optimizer_class import arguments_of, optimizer_class
from lora_one.optim.paired import create_pair_optimizer
from lora_one.optim.param_groups import param_groups
from lora_one.optim.scaled import create_scaled_optimizer

if TYPE_CHECKING:
    from lora_one.config import RunConfig

__all__ = [
    "AdamW",
    "LoraMuon",
    "LoraPro",
    "LoraRite",
    "build_optimizer",
    "create_pair_optimizer",
    "create_scaled_optimizer",
]


def build_optimizer(model: nn.Module, run: "RunConfig") -> Optimizer:
    """Return the optimizer that ``optimizer.name`` names, over the trainable parameters of the model.

    The other keys of ``optimizer`` are its arguments. Raises UsageError: see `optimizer_class`, `param_groups`,
    `create_scaled_optimizer`, `create_pair_optimizer`.
    """
    chosen = optimizer_class(run.optimizer)
    groups = param_groups(model, run.model.learning_rate, run.model.weight_decay, run.peft)
    options = dataclasses.asdict(run.optimizer) | {"lr": run.model.learning_rate}
    del options["name"]
    if "fused" in arguments_of(chosen):
        options["fused"] = any(parameter.is_cuda for group in groups for parameter in group["params"])
    if run.optimizer.preconditioned:
        return create_scaled_optimizer(model, chosen, reg=run.model.prec_reg, params=groups, **options)
    if run.optimizer.steps_pairs:
        return create_pair_optimizer(model, chosen, weight_decay=run.model.weight_decay, **options)
    return chosen(groups, **options)
