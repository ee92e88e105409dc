"""What the settings of every initialisation method have in common: the facts about a method, and their defaults."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from lora_one.errors import UsageError, nearest

if TYPE_CHECKING:
    from lora_one.config.schemas import ModelConfig

Choices = dict[str, tuple[str, ...]]  # key -> the values it may have
Ranges = dict[str, tuple[str, Callable[[Any], bool]]]  # key -> (the rule in words, the rule)

TOLERANCE: Ranges = {"tolerance": ("in (0, 1)", lambda v: 0 < v < 1)}
GA_DIRECTIONS: Choices = {"ga_direction": ("ArB2r", "A2rBr", "ArBr", "random")}


@dataclass(frozen=True)
class MethodSettings:
    """The keys that every method reads. A class attribute is a fact about the method; a subclass states its own."""

    method: str  # the key of the table METHODS
    dtype: str  # of the adapter
    seed: int | None  # null = the run's seed
    cache: str | None  # a folder of factors that were found earlier, see initialization.cache

    title: ClassVar[str]  # in run.json, tables and messages
    vectors: ClassVar[int] = 1  # leading singular vectors of the gradient, as a multiple of the rank
    needs_gradient: ClassVar[bool] = False  # the mean gradient over training examples, reduced to a low-rank step
    needs_examples: ClassVar[bool] = False  # training examples, for a gradient or otherwise
    gradient_by_peft: ClassVar[bool] = False  # PEFT computes a gradient of its own from the examples
    transform: ClassVar[str | None] = None  # function of the method's module, applied to the gradient before its SVD
    reads_weights: ClassVar[bool] = False  # every layer's whole weight
    changes_base: ClassVar[bool] = False  # the base becomes W - s B A, with the values of the method's own file
    trains_core: ClassVar[bool] = False  # only an r x r core between frozen factors
    unit_scaling: ClassVar[bool] = False  # s = 1: alpha becomes r, without rsLoRA
    plain: ClassVar[bool] = False  # random adapters without a start: accepted where no adapter is started
    choices: ClassVar[Choices] = {"dtype": ("fp32", "bf16")}  # of this class's keys; see value_rules
    ranges: ClassVar[Ranges] = {"seed": ("an integer in [0, 2^32)", lambda v: 0 <= v < 2**32)}
    extra: ClassVar[str] = ""  # of lora-one, where packages are needed
    packages: ClassVar[dict[str, str]] = {}  # needed by the method: package -> its module

    @classmethod
    def value_rules(cls) -> tuple[Choices, Ranges]:
        """Return what the values may be, by ``init.<key>``, from this class and those it derives from."""
        kinds = [kind for kind in cls.__mro__ if issubclass(kind, MethodSettings)]
        choices = {f"init.{key}": rule for kind in kinds for key, rule in vars(kind).get("choices", {}).items()}
        ranges = {f"init.{key}": rule for kind in kinds for key, rule in vars(kind).get("ranges", {}).items()}
        return choices, ranges

    @property
    def module(self) -> str:
        """File in initialization/methods/ that computes the factors."""
        return self.method

    @property
    def by_peft(self) -> bool:
        """Whether PEFT computes the factors of all layers at once."""
        return False

    @property
    def shifts_base(self) -> bool:
        """Whether the base becomes W - s B A with these settings."""
        return self.changes_base

    @property
    def zero_start(self) -> bool:
        """Whether B is zero by its settings, so there is no start to speak of."""
        return False

    @property
    def search_from(self) -> float | None:
        """Return the gamma from which the least loss is searched for; None where the scale is given."""
        return None

    @property
    def further_examples(self) -> int:
        """Number of training examples besides the method's own that a search looks at, if there are so many."""
        return 0

    @property
    def required_further(self) -> int:
        """Number of those that the settings ask for explicitly."""
        return 0

    @property
    def short_name(self) -> str:
        """The method's part of a folder name."""
        return self.title

    def with_dora(self, name: str) -> str:
        """Return the method's name where the adapters are DoRA's."""
        return f"DoRA-{name}"

    def title_with(self, dora: bool) -> str:
        """Return the title, with or without DoRA."""
        return self.with_dora(self.title) if dora else self.title

    def folder_parts(self, alpha: float) -> list[str]:
        """Return the main settings as a folder name shows them, alpha among them."""
        return [f"a{alpha:g}"]

    def resolved(self) -> Self:
        """Fill in the values that null stands for, so that equal runs have equal settings and one folder."""
        return self

    def completed(self, first_step_size: Callable[[], float]) -> Self:
        """Fill in what is known only with the training data: the size of the first optimizer step."""
        return self

    def remedy(self) -> str:
        """Say which key makes a start smaller that raised the loss."""
        return "set model.bf16=false: a base in 16 bits rounds W - s B A"

    def check(self) -> None:
        """Check the values together. Raises UsageError."""

    def check_model(self, model: "ModelConfig") -> None:
        """Check what the method needs of the model. Raises UsageError."""


@dataclass(frozen=True)
class ExampleSettings(MethodSettings):
    """Of a method that looks at bsz x iters training examples (or sub_size with do_subsampling; or all with null)."""

    bsz: int | None
    iters: int | None
    do_subsampling: bool
    sub_size: int | None
    max_length: int | None  # tokens; null = model.max_length

    needs_examples: ClassVar[bool] = True
    ranges: ClassVar[Ranges] = {
        "bsz": ("at least 1", lambda v: v >= 1),
        "iters": ("at least 1", lambda v: v >= 1),
        "sub_size": ("at least 1", lambda v: v >= 1),
        "max_length": ("at least 2 tokens", lambda v: v >= 2),
    }

    @property
    def examples_wanted(self) -> int | None:
        """Number of examples; None for the whole training set."""
        if self.do_subsampling:
            return self.sub_size
        return None if self.bsz is None else self.bsz * self.iters

    def check(self) -> None:
        super().check()
        if self.do_subsampling and self.sub_size is None:
            raise UsageError("init.do_subsampling=true needs a size: set init.sub_size=<number of examples>")
        if self.sub_size is not None and not self.do_subsampling:
            raise UsageError(
                f"init.sub_size={self.sub_size} is read only with init.do_subsampling=true: add it, or drop "
                "init.sub_size"
            )
        if not self.do_subsampling and (self.bsz is None) != (self.iters is None):
            raise UsageError(
                f"init.bsz={self.bsz} with init.iters={self.iters}: give both (bsz x iters examples) or set both to "
                "null (the whole training set)"
            )


@dataclass(frozen=True)
class GradientSettings(ExampleSettings):
    """Of a method that starts from the mean gradient over the examples."""

    reduction: str
    tolerance: float  # share of sigma_i^2 that each direction i of the low-rank step may miss
    memory: str  # where gradients wait: see initialization.holding.how_to_hold

    needs_gradient: ClassVar[bool] = True
    choices: ClassVar[Choices] = {"reduction": ("example", "token"), "memory": ("auto", "fast", "low")}
    ranges: ClassVar[Ranges] = TOLERANCE


@dataclass(frozen=True)
class PeftSettings(MethodSettings):
    """Of a method that PEFT computes, from the whole weights."""

    reads_weights: ClassVar[bool] = True

    @property
    def module(self) -> str:
        return "peft_methods"

    @property
    def by_peft(self) -> bool:
        return True


@dataclass(frozen=True)
class ScaledSettings(MethodSettings):
    """Of a method whose factors are multiplied by a scale, one kind of which divides by sqrt(gamma)."""

    scale: str | None  # null = the method's own, see resolved
    stable_gamma: float | None  # of scale=stable; null = the method's own

    scales: ClassVar[tuple[str, ...]] = ("stable", "gd", "unit", "weightS")
    default_gamma: ClassVar[float] = 16.0
    ranges: ClassVar[Ranges] = {"stable_gamma": ("positive", lambda v: v > 0 and math.isfinite(v))}

    @property
    def gamma(self) -> float:
        return self.default_gamma if self.stable_gamma is None else self.stable_gamma

    def folder_parts(self, alpha: float) -> list[str]:
        return [*super().folder_parts(alpha), f"g{self.gamma:g}" if self.scale == "stable" else str(self.scale)]

    def remedy(self) -> str:
        if self.scale == "stable" and not self.by_peft:
            return f"raise init.stable_gamma (now {self.gamma:g}), or set model.bf16=false where the base is in 16 bits"
        return super().remedy()

    def check(self) -> None:
        if self.scale not in self.scales:
            raise UsageError(
                f"init.scale={self.scale} is not a choice of init={self.method}; {nearest(self.scale, self.scales)}"
            )
        if self.scale != "stable" and self.stable_gamma is not None:
            raise UsageError(
                f"init.stable_gamma={self.stable_gamma} is read only with init.scale=stable, and "
                f"init.scale={self.scale} chooses the scale itself: drop one of the two"
            )
        super().check()


def filled_in(settings: Any, automatic: str) -> dict[str, Any]:
    """Return scale and gamma of a scaled method with their nulls filled in."""
    scale = settings.scale or automatic
    return {"scale": scale, "stable_gamma": settings.gamma if scale == "stable" else settings.stable_gamma}
