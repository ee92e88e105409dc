"""The settings of every optimizer, with every fact about it: one class each and one line in OPTIMIZERS."""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class OptimizerConfig:
    """The keys of an optimizer are the arguments of its class, besides learning rate and weight decay.

    implementation: where that class is, a subclass of torch.optim.Optimizer.
    preconditioned: the gradients of LoRA's factors are multiplied by the inverse of their partner's Gram matrix
    + lambda I, lambda = model.prec_reg, before its steps; see optim.scaled.
    """

    name: str

    implementation: ClassVar[str]
    preconditioned: ClassVar[bool] = False


@dataclass(frozen=True)
class AdamConfig(OptimizerConfig):
    betas: list[float]
    eps: float

    implementation: ClassVar[str] = "torch.optim.AdamW"


@dataclass(frozen=True)
class SgdConfig(OptimizerConfig):
    momentum: float

    implementation: ClassVar[str] = "torch.optim.SGD"


@dataclass(frozen=True)
class ScaledConfig(OptimizerConfig):
    damping: str  # lambda as it is, or relative to the Gram matrix's mean diagonal
    order: str  # both factors from the same point, or B after A's step

    preconditioned: ClassVar[bool] = True


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
