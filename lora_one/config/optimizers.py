"""The settings of every optimizer, with every fact about it: one class each and one line in OPTIMIZERS."""

import math
from dataclasses import dataclass
from typing import ClassVar, get_args

from lora_one.config.checked import CheckedSettings, Choices, Ranges
from lora_one.config.schemas import ModelConfig, PeftConfig
from lora_one.errors import UsageError
from lora_one.types import Damping, Order


@dataclass(frozen=True)
class OptimizerConfig(CheckedSettings):
    """The keys of an optimizer: arguments of its class other than learning rate and weight decay.

    implementation: path of the class, a subclass of torch.optim.Optimizer; see ``optim.optimizer_class``.
    preconditioned: before each step, the gradients of LoRA's factors are multiplied by the inverse of their partner's
    Gram matrix + lambda I, with lambda = model.prec_reg; see ``optim.scaled``.
    steps_pairs: the class steps both factors of a pair together; see ``optim.paired``.
    full_size_moments: it keeps two fp32 moments of the size of each adapted weight.
    """

    name: str  # the key of the table OPTIMIZERS

    section: ClassVar[str] = "optimizer"
    implementation: ClassVar[str]
    preconditioned: ClassVar[bool] = False
    steps_pairs: ClassVar[bool] = False
    full_size_moments: ClassVar[bool] = False

    @property
    def needs_pairs(self) -> bool:
        """Return whether the optimizer needs LoRA layers of which both factors are trained."""
        return self.preconditioned or self.steps_pairs

    def check(self, model: ModelConfig, peft: PeftConfig) -> None:
        """Raise UsageError if the optimizer does not work with these settings."""
        return None


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


@dataclass(frozen=True)
class PairConfig(OptimizerConfig):
    others_lr: float | None  # learning rate of AdamW for parameters outside pairs; null = model.learning_rate

    steps_pairs: ClassVar[bool] = True
    ranges: ClassVar[Ranges] = {"others_lr": ("positive", lambda v: v > 0 and math.isfinite(v))}

    def check(self, model: ModelConfig, peft: PeftConfig) -> None:
        if peft.use_loraplus:
            raise UsageError(
                f"peft.use_loraplus={peft.use_loraplus} sets a separate learning rate for B, but optimizer="
                f"{self.name} steps B and A together: set peft.use_loraplus=false, or another optimizer"
            )


@dataclass(frozen=True)
class LoraProConfig(AdamConfig, PairConfig):
    implementation: ClassVar[str] = "lora_one.optim.lora_pro.LoraPro"
    full_size_moments: ClassVar[bool] = True


@dataclass(frozen=True)
class LoraMuonConfig(PairConfig):
    momentum: float
    damping: float  # relative to the norm of each Gram matrix
    sign_steps: int  # polynomials of the matrix sign

    implementation: ClassVar[str] = "lora_one.optim.lora_muon.LoraMuon"
    ranges: ClassVar[Ranges] = {
        "momentum": ("in [0, 1)", lambda v: 0 <= v < 1),
        "damping": ("in [1e-6, 1): fp32 cannot decompose a singular matrix with less", lambda v: 1e-6 <= v < 1),
        "sign_steps": ("at least 1", lambda v: v >= 1),
    }

    def check(self, model: ModelConfig, peft: PeftConfig) -> None:
        super().check(model, peft)
        if model.learning_rate * model.weight_decay >= 1:
            raise UsageError(
                f"optimizer={self.name} multiplies B A by 1 - weight_decay x learning_rate at every step, which is not "
                f"positive for model.weight_decay={model.weight_decay:g} and model.learning_rate="
                f"{model.learning_rate:g}: lower one of them"
            )


@dataclass(frozen=True)
class LoraRiteConfig(AdamConfig, PairConfig):
    max_norm: float  # of the gradients of all pairs together, in the coordinates of the optimizer; 0 = no limit

    implementation: ClassVar[str] = "lora_one.optim.lora_rite.LoraRite"
    ranges: ClassVar[Ranges] = {"max_norm": ("not negative (0 = no limit)", lambda v: v >= 0 and math.isfinite(v))}


OPTIMIZERS: dict[str, type[OptimizerConfig]] = {
    "adamw": AdamConfig,
    "lora_muon": LoraMuonConfig,
    "lora_pro": LoraProConfig,
    "lora_rite": LoraRiteConfig,
    "scaled_adamw": ScaledAdamConfig,
    "scaled_gd": ScaledSgdConfig,
    "sgd": SgdConfig,
}
