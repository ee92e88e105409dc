"""Methods of PEFT that look at training examples."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lora_one.config.checked import Choices, Ranges
from lora_one.config.methods.base import GA_DIRECTIONS, ExampleSettings, PeftSettings, ScaledSettings
from lora_one.errors import UsageError
from lora_one.model_kinds import CAUSAL

if TYPE_CHECKING:
    from lora_one.config.schemas import ModelConfig


@dataclass(frozen=True)
class EvaSettings(PeftSettings, ExampleSettings):
    """EVA (arXiv:2410.07170)."""

    tau: float  # a component has converged if its cosine similarity with the one a batch earlier is at least this
    whiten: bool

    title: ClassVar[str] = "eva"
    causal_only: ClassVar[bool] = True
    ranges: ClassVar[Ranges] = {"tau": ("in [0, 1)", lambda v: 0 <= v < 1)}

    def check_model(self, model: "ModelConfig") -> None:
        if model.kind is not CAUSAL:
            raise UsageError(
                f"init=eva works only with causal models, not with model.type={model.type}: set init=pissa, corda or "
                "lora_one"
            )


@dataclass(frozen=True)
class CordaSettings(PeftSettings, ExampleSettings):
    """CorDA (arXiv:2406.05223)."""

    corda_method: str

    title: ClassVar[str] = "corda"
    changes_base: ClassVar[bool] = True
    choices: ClassVar[Choices] = {"corda_method": ("ipm", "kpm")}
    extra: ClassVar[str] = "corda"
    packages: ClassVar[dict[str, str]] = {"attrs": "attr"}


@dataclass(frozen=True)
class PeftLoraGASettings(ScaledSettings, PeftSettings, ExampleSettings):
    """LoRA-GA as implemented in PEFT."""

    ga_direction: str  # which singular vectors each factor gets

    title: ClassVar[str] = "lora_ga_peft"
    vectors: ClassVar[int] = 2
    changes_base: ClassVar[bool] = True
    gradient_by_peft: ClassVar[bool] = True
    choices: ClassVar[Choices] = GA_DIRECTIONS
