"""The settings of every optimizer, with every fact about it: one class each and one line in OPTIMIZERS."""

import math
from dataclasses import dataclass
from typing import ClassVar, get_args

from lora_one.config.checked import CheckedSettings, Choices, Ranges
from lora_one.types import Damping, Order


@dataclass(frozen=True)
class OptimizerConfig(CheckedSettings):
    """The keys of an optimizer: arguments of its class other than learning rate and weight decay.

    implementation: path of the class, a subclass of torch.optim.Optimizer; see ``optim.optimizer_class``.
    preconditioned: before each step, the gradients of LoRA's factors are multiplied by the inverse of their partner's
    Gram matrix + lambda I, with lambda = model.prec_reg; see ``optim.scaled``.
    """

    name: str  # the key of the table OPTIMIZERS

    section: ClassVar[str] = "optimizer"
    implementation: ClassVar[str]
    preconditioned: ClassVar[bool] = False


@dataclass(frozen=True)
class AdamConfig(OptimizerConfig):
    betas: list[float]
    eps: float

    implementation: ClassVar[str] = "torch.optim.AdamW"
    ranges: ClassVar[Ranges] = {
        "betas": ("two numbers in [0, 1)", lambda v: len(v) == 2 and all(0 <= beta < 1 for beta in v)),
        "eps": ("positive", lambda v: v > 0 and math.isfinite(v)),
    }


@dataclass(frozen=True)
class SgdConfig(OptimizerConfig):
    momentum: float

    implementation: ClassVar[str] = "torch.optim.SGD"
    ranges: ClassVar[Ranges] = {"momentum": ("in [0, 1)", lambda v: 0 <= v < 1)}


@dataclass(frozen=True)
class ScaledConfig(OptimizerConfig):
    damping: str  # whether lambda is absolute, or relative to the mean diagonal of the Gram matrix
    order: str  # whether B's gradient is preconditioned by A before A's step, or after it

    preconditioned: ClassVar[bool] = True
    choices: ClassVar[Choices] = {"damping": get_args(Damping), "order": get_args(Order)}


@dataclass(frozen=True)
class ScaledAdamConfig(AdamConfig, ScaledConfig):
    correct_bias: bool

    implementation: ClassVar[str] = "lora_one.optim.adamw.AdamW"


@dataclass(frozen=True)
class ScaledSgdConfig(SgdConfig, ScaledConfig):
    pass


OPTIMIZERS: dict[str, type[OptimizerConfig]] = {
    "adamw": AdamConfig,
    "scaled_adamw": ScaledAdamConfig,
    "scaled_gd": ScaledSgdConfig,
    "sgd": SgdConfig,
}
