"""Methods that use the one-step gradient."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from lora_one.config.checked import Choices, Ranges
from lora_one.config.methods.base import (
    GA_DIRECTIONS,
    ExampleSettings,
    GradientSettings,
    ScaledSettings,
    WholeGradientSettings,
    filled_in,
)
from lora_one.errors import UsageError


@dataclass(frozen=True)
class LoraOneSettings(ScaledSettings, GradientSettings):
    """LoRA-One (arXiv:2502.01235). If scale is null, it is searched for, unless gamma is set."""

    search_examples: int | None  # further examples for scale=search; 0: the gradient's; null: see RunConfig
    normalize: str  # s0: divide the singular values by the largest; none: keep them
    shuffle: str | None  # a control; directions: random singular vectors; spectrum: singular values in random order

    title: ClassVar[str] = "LoRA-One"
    scales: ClassVar[tuple[str, ...]] = (*ScaledSettings.scales, "search")
    default_gamma: ClassVar[float] = 128.0
    choices: ClassVar[Choices] = {"normalize": ("s0", "none"), "shuffle": ("directions", "spectrum")}
    ranges: ClassVar[Ranges] = {"search_examples": ("0 (use the gradient's examples) or more", lambda v: v >= 0)}

    @property
    def search_from(self) -> float | None:
        return self.gamma if self.scale == "search" else None

    @property
    def further_examples(self) -> int:
        if self.scale != "search":
            return 0
        return (self.examples_wanted or 0) if self.search_examples is None else self.search_examples

    @property
    def required_further(self) -> int:
        return self.search_examples or 0

    @property
    def rearrangement(self) -> str | None:
        return "shuffled" if self.shuffle else None

    def with_dora(self, name: str) -> str:
        return "DoRA-One"

    def title_with(self, dora: bool) -> str:
        return super().title_with(dora) + (f", shuffled {self.shuffle}" if self.shuffle else "")

    def folder_parts(self, alpha: float) -> list[str]:
        return [*super().folder_parts(alpha), *([f"shuffled-{self.shuffle}"] if self.shuffle else [])]

    def resolved(self) -> Self:
        return replace(self, **filled_in(self, "search" if self.stable_gamma is None else "stable"))

    def remedy(self) -> str:
        if self.shuffle:
            return f"remove init.shuffle={self.shuffle}, a control whose start may raise the loss, for LoRA-One itself"
        if self.scale == "search":
            return "use more examples (init.iters), or set init.stable_gamma to a large number"
        if self.scale == "stable":
            return f"remove init.stable_gamma (the scale is then searched for), or raise it (now {self.gamma:g})"
        return f"remove init.scale={self.scale} (the scale is then searched for), or set a large init.stable_gamma"

    def check(self) -> None:
        super().check()
        if self.search_examples is not None and self.scale != "search":
            raise UsageError(
                f"init.search_examples={self.search_examples} is used only with init.scale=search, not with "
                f"init.scale={self.scale}: remove one of the two"
            )

    def check_rank(self, rank: int, key: str) -> None:
        if self.shuffle == "spectrum" and rank == 1:
            raise UsageError(
                f"init.shuffle=spectrum changes the order of {key}=1 singular value, which leaves the start as it is: "
                f"set {key}=2 or more, or init.shuffle=directions"
            )


@dataclass(frozen=True)
class LoraGASettings(ScaledSettings, GradientSettings):
    """LoRA-GA (arXiv:2407.05000), as in the authors' code."""

    ga_direction: str  # which singular vectors each factor gets

    title: ClassVar[str] = "LoRA-GA"
    vectors: ClassVar[int] = 2
    changes_base: ClassVar[bool] = True
    choices: ClassVar[Choices] = GA_DIRECTIONS

    def resolved(self) -> Self:
        return replace(self, **filled_in(self, "stable"))

    def check(self) -> None:
        if self.scale == "search":
            raise UsageError(
                "init.scale=search compares the loss at several gammas, but with LoRA-GA the loss after the "
                "initialisation does not depend on gamma: set init.scale=stable and init.stable_gamma"
            )
        super().check()


@dataclass(frozen=True)
class LoraSBSettings(GradientSettings):
    """LoRA-SB (arXiv:2411.19557): the r x r core is the step itself, so s = 1."""

    eta: float | None  # size of the step; null = see training.schedule.first_step_size

    title: ClassVar[str] = "LoRA-SB"
    transform: ClassVar[str | None] = "descent_signs"
    trains_core: ClassVar[bool] = True
    unit_scaling: ClassVar[bool] = True
    from_training: ClassVar[dict[str, str]] = {"eta": "the size of its first step (the learning rate)"}
    ranges: ClassVar[Ranges] = {"eta": ("positive", lambda v: v > 0 and math.isfinite(v))}

    def folder_parts(self, alpha: float) -> list[str]:
        """Return eta if it is set; alpha has no effect."""
        return [] if self.eta is None else [f"eta{self.eta:g}"]

    def completed(self, first_step_size: Callable[[], float], examples: int | None = None) -> Self:
        return self if self.eta is not None else replace(self, eta=first_step_size())

    def remedy(self) -> str:
        return f"lower init.eta (now {self.eta:g})"


@dataclass(frozen=True)
class FullStepSettings(ExampleSettings):
    """One step with the full gradient, W - eta G, the "one-step full gradient" of arXiv:2502.01235."""

    reduction: str
    eta: float | None  # size of the step; null = searched for
    search_examples: int | None  # further examples for the search; 0: the gradient's; null: see RunConfig

    title: ClassVar[str] = "full gradient step"
    needs_gradient: ClassVar[bool] = True
    changes_base: ClassVar[bool] = True
    steps_weights: ClassVar[bool] = True
    choices: ClassVar[Choices] = {"reduction": ("example", "token")}
    ranges: ClassVar[Ranges] = {
        "eta": ("positive", lambda v: v > 0 and math.isfinite(v)),
        "search_examples": ("0 (use the gradient's examples) or more", lambda v: v >= 0),
    }

    @property
    def further_examples(self) -> int:
        if self.eta is not None:
            return 0
        return (self.examples_wanted or 0) if self.search_examples is None else self.search_examples

    @property
    def required_further(self) -> int:
        return self.search_examples or 0

    @property
    def short_name(self) -> str:
        return "full-step"

    def folder_parts(self, alpha: float) -> list[str]:
        """Return eta if it is set; alpha has no effect."""
        return ["search" if self.eta is None else f"eta{self.eta:g}"]

    def remedy(self) -> str:
        if self.eta is None:
            return "use more examples (init.iters), or set init.eta to a small number"
        return f"lower init.eta (now {self.eta:g}), or remove it (it is then searched for)"

    def check(self) -> None:
        super().check()
        if self.search_examples is not None and self.eta is not None:
            raise UsageError(
                f"init.search_examples={self.search_examples} is used only if eta is searched for, but "
                f"init.eta={self.eta:g}: remove one of the two"
            )
        if self.cache is not None:
            raise UsageError(
                f"init.cache={self.cache} stores factors of adapters, but {self.title} has none: remove it"
            )


@dataclass(frozen=True)
class GoraSettings(WholeGradientSettings):
    """GoRA (arXiv:2502.12171): ranks by importance, within the parameters of rank lora_r; B from the gradient."""

    step_size: float  # gamma of the paper: E ||s B A||_F is about gamma ||G||_F
    min_rank: int
    max_rank: int

    title: ClassVar[str] = "GoRA"
    reads_weights: ClassVar[bool] = True
    sets_ranks: ClassVar[bool] = True
    ranges: ClassVar[Ranges] = {
        "step_size": ("positive", lambda v: v > 0 and math.isfinite(v)),
        "min_rank": (
            "at least 1, because the budget could give a layer rank 0, which has no adapter",
            lambda v: v >= 1,
        ),
        "max_rank": ("at least 1", lambda v: v >= 1),
    }

    def folder_parts(self, alpha: float) -> list[str]:
        return [*super().folder_parts(alpha), f"r{self.min_rank}-{self.max_rank}", f"step{self.step_size:g}"]

    def remedy(self) -> str:
        return f"lower init.step_size (now {self.step_size:g})"

    def check(self) -> None:
        super().check()
        if self.min_rank > self.max_rank:
            raise UsageError(f"init.min_rank={self.min_rank} is larger than init.max_rank={self.max_rank}: lower it")

    def check_rank(self, rank: int, key: str) -> None:
        if not self.min_rank <= rank <= self.max_rank:
            raise UsageError(
                f"{key}={rank} is the mean rank that the budget of init={self.method} pays for, so it must be in "
                f"[init.min_rank={self.min_rank}, init.max_rank={self.max_rank}]: change one of the three"
            )
