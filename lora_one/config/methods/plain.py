"""Methods that draw their factors at random."""

import math
from dataclasses import dataclass
from typing import ClassVar

from lora_one.config.checked import Choices, Ranges
from lora_one.config.methods.base import MethodSettings

DISTRIBUTIONS = ("kaiming", "fan_out_kaiming", "gaussian", "xavier", "orthogonal", "unit", "zeros")


@dataclass(frozen=True)
class LoraSettings(MethodSettings):
    """LoRA (arXiv:2106.09685) and variants: each factor is drawn from a distribution.

    If B A is not zero, the base becomes W - s B A.
    """

    lora_A: str
    lora_B: str
    lora_A_std: float  # standard deviation of gaussian
    lora_B_std: float

    title: ClassVar[str] = "LoRA"
    plain: ClassVar[bool] = True
    choices: ClassVar[Choices] = {"lora_A": DISTRIBUTIONS, "lora_B": DISTRIBUTIONS}
    ranges: ClassVar[Ranges] = {
        "lora_A_std": ("not negative", lambda v: v >= 0 and math.isfinite(v)),
        "lora_B_std": ("not negative", lambda v: v >= 0 and math.isfinite(v)),
    }

    @property
    def shifts_base(self) -> bool:
        return "zeros" not in (self.lora_A, self.lora_B)

    @property
    def zero_start(self) -> bool:
        return self.lora_B == "zeros"

    @property
    def short_name(self) -> str:
        return f"LoRA-{self.lora_A}"

    def remedy(self) -> str:
        return "lower init.lora_A_std and init.lora_B_std, or set init=lora"


@dataclass(frozen=True)
class RandomAbSettings(MethodSettings):
    """Init[AB] (arXiv:2505.23194): both factors are random and not zero."""

    bound: float  # entries are uniform in +-bound/sqrt(n)
    reset: bool  # the base becomes W - s B A, so the function does not change

    title: ClassVar[str] = "Init[AB]"
    changes_base: ClassVar[bool] = True
    ranges: ClassVar[Ranges] = {"bound": ("positive", lambda v: v > 0 and math.isfinite(v))}

    @property
    def shifts_base(self) -> bool:
        return self.reset

    @property
    def short_name(self) -> str:
        return "Init-AB"

    def folder_parts(self, alpha: float) -> list[str]:
        return [*super().folder_parts(alpha), f"c{self.bound:g}", *([] if self.reset else ["no-reset"])]

    def remedy(self) -> str:
        return super().remedy() if self.reset else f"lower init.bound (now {self.bound:g}), or set init.reset=true"
