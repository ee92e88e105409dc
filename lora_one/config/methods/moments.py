"""A method that uses the one-step gradient and second moments of the layers' inputs and output gradients."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from lora_one.config.checked import Ranges
from lora_one.config.methods.base import GradientSettings


@dataclass(frozen=True)
class LoraDASettings(GradientSettings):
    """LoRA-DA (arXiv:2510.24561), as in the authors' code."""

    stable_gamma: float  # both factors are divided by its square root
    da_alpha: float  # weight of the step's directions
    da_beta: float  # weight of the noise
    damping: float  # added to the diagonals of both second moments
    train_examples: int | None  # N of the noise; null = the number of training examples

    title: ClassVar[str] = "LoRA-DA"
    needs_moments: ClassVar[bool] = True
    from_training: ClassVar[dict[str, str]] = {"train_examples": "the number of training examples"}
    ranges: ClassVar[Ranges] = {
        "stable_gamma": ("positive", lambda v: v > 0 and math.isfinite(v)),
        "da_alpha": ("positive", lambda v: v > 0 and math.isfinite(v)),
        "da_beta": ("not negative", lambda v: v >= 0 and math.isfinite(v)),
        "damping": ("not negative", lambda v: v >= 0 and math.isfinite(v)),
        "train_examples": ("at least 1", lambda v: v >= 1),
    }

    def folder_parts(self, alpha: float) -> list[str]:
        return [*super().folder_parts(alpha), f"g{self.stable_gamma:g}"]

    def completed(self, first_step_size: Callable[[], float], examples: int | None = None) -> Self:
        return self if self.train_examples is not None else replace(self, train_examples=examples)

    def remedy(self) -> str:
        return f"raise init.stable_gamma (now {self.stable_gamma:g})"
