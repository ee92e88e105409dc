"""Methods that use the weight of each layer."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lora_one.config.checked import Ranges
from lora_one.config.methods.base import TOLERANCE, MethodSettings, PeftSettings, ScaledSettings
from lora_one.errors import UsageError

if TYPE_CHECKING:
    from lora_one.config.schemas import ModelConfig


@dataclass(frozen=True)
class SvdSettings(ScaledSettings):
    """Singular vectors of the weight, with a choice of scales."""

    tolerance: float  # share of sigma_i^2 that each direction i of the randomised SVD may miss

    title: ClassVar[str] = "svd"
    ranges: ClassVar[Ranges] = TOLERANCE
    scales: ClassVar[tuple[str, ...]] = ("default", "stable", "unit", "normalized")
    reads_weights: ClassVar[bool] = True
    changes_base: ClassVar[bool] = True


@dataclass(frozen=True)
class PissaSettings(PeftSettings):
    """PiSSA (arXiv:2404.02948), with our SVD or one of PEFT's."""

    niter: int | str | None  # null = our SVD; "exact" = PEFT's exact SVD; a number = power iterations of its fast SVD
    tolerance: float  # of our SVD: share of sigma_i^2 that each direction i may miss

    title: ClassVar[str] = "pissa"
    ranges: ClassVar[Ranges] = TOLERANCE | {
        "niter": (
            "exact, or an integer that is not negative",
            lambda v: v == "exact" or (isinstance(v, int) and v >= 0),
        )
    }
    changes_base: ClassVar[bool] = True

    @property
    def by_peft(self) -> bool:
        return self.niter is not None

    @property
    def module(self) -> str:
        return "peft_methods" if self.by_peft else self.method


@dataclass(frozen=True)
class OloraSettings(PeftSettings):
    """OLoRA (arXiv:2406.01775), by PEFT."""

    title: ClassVar[str] = "olora"
    changes_base: ClassVar[bool] = True


@dataclass(frozen=True)
class LoftqSettings(MethodSettings):
    """LoftQ (arXiv:2310.08659): compensates the quantisation error of the weight."""

    tolerance: float

    title: ClassVar[str] = "LoftQ"
    needs_quantised: ClassVar[bool] = True
    ranges: ClassVar[Ranges] = TOLERANCE
    reads_weights: ClassVar[bool] = True

    def remedy(self) -> str:
        return "set init=lora"

    def check_model(self, model: "ModelConfig") -> None:
        if model.quantization is None:
            raise UsageError(
                "init=loftq compensates the quantisation error of the base, but model.quantization=null: add "
                "model.quantization=nf4, or set init=pissa"
            )


@dataclass(frozen=True)
class LoraXsSettings(MethodSettings):
    """LoRA-XS (arXiv:2405.17604): frozen factors from the weight's singular vectors, with a small random core."""

    lora_R_std: float
    tolerance: float

    title: ClassVar[str] = "LoRA-XS"
    ranges: ClassVar[Ranges] = TOLERANCE | {"lora_R_std": ("not negative", lambda v: v >= 0 and math.isfinite(v))}
    reads_weights: ClassVar[bool] = True
    trains_core: ClassVar[bool] = True

    def remedy(self) -> str:
        return "lower init.lora_R_std"


@dataclass(frozen=True)
class MiloraSettings(MethodSettings):
    """MiLoRA (arXiv:2406.09044): the last singular vectors of the weight are trained."""

    title: ClassVar[str] = "MiLoRA"
    reads_weights: ClassVar[bool] = True
    changes_base: ClassVar[bool] = True


@dataclass(frozen=True)
class LoramSettings(MethodSettings):
    """LoRAM (arXiv:2507.06558): a fixed basis of sines, as large as the norm of the weight requires."""

    title: ClassVar[str] = "LoRAM"
    reads_weights: ClassVar[bool] = True
    changes_base: ClassVar[bool] = True

    def check_rank(self, rank: int, key: str) -> None:
        if rank == 1:
            raise UsageError(
                f"{key}=1 gives zero factors with init={self.method}, because their size is proportional to ln(r), and "
                f"zero factors cannot be trained: set {key}=2 or more, or init=lora"
            )
