"""Methods of PEFT that look at training examples."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lora_one.config.methods.base import GA_DIRECTIONS, Choices, ExampleSettings, PeftSettings, Ranges, ScaledSettings
from lora_one.errors import UsageError
from lora_one.model_kinds import CAUSAL

if TYPE_CHECKING:
    from lora_one.config.schemas import ModelConfig


@dataclass(frozen=True)
class EvaSettings(PeftSettings, ExampleSettings):
    """EVA (arXiv:2410.07170)."""

    tau: float  # cosine similarity of a component with itself one batch earlier at which it counts as settled
    whiten: bool

    title: ClassVar[str] = "eva"
    ranges: ClassVar[Ranges] = {"tau": ("in [0, 1)", lambda v: 0 <= v < 1)}

    def check_model(self, model: "ModelConfig") -> None:
        if model.kind is not CAUSAL:
            raise UsageError(
                f"init=eva looks at the answers' tokens in the layers of causal models, not in those of "
                f"model.type={model.type}: take init=pissa, corda or lora_one"
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
    """LoRA-GA as PEFT has it."""

    ga_direction: str  # which singular vectors each factor gets

    title: ClassVar[str] = "lora_ga_peft"
    vectors: ClassVar[int] = 2
    changes_base: ClassVar[bool] = True
    gradient_by_peft: ClassVar[bool] = True
    choices: ClassVar[Choices] = GA_DIRECTIONS
