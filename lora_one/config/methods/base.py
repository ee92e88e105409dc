"""Base classes of the methods' settings: the facts that a method states about itself, with their defaults."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from lora_one.config.checked import SEED, CheckedSettings, Choices, Ranges
from lora_one.errors import UsageError, nearest

if TYPE_CHECKING:
    from lora_one.config.schemas import ModelConfig

TOLERANCE: Ranges = {"tolerance": ("in (0, 1)", lambda v: 0 < v < 1)}
GA_DIRECTIONS: Choices = {"ga_direction": ("ArB2r", "A2rBr", "ArBr", "random")}


@dataclass(frozen=True)
class MethodSettings(CheckedSettings):
    """The keys that every method reads. Class attributes are facts about the method, which a subclass can override."""

    method: str  # the key of the table METHODS
    dtype: str  # of the adapter
    seed: int | None  # null = the run's seed
    cache: str | None  # a folder for factors and for evaluations before training, see initialization.cache

    section: ClassVar[str] = "init"
    title: ClassVar[str]  # in run.json, tables and messages
    vectors: ClassVar[int] = 1  # leading singular vectors of the gradient, as a multiple of the rank
    needs_gradient: ClassVar[bool] = False  # uses the mean gradient over training examples
    needs_examples: ClassVar[bool] = False  # uses training examples, for a gradient or for something else
    needs_moments: ClassVar[bool] = False  # uses whole gradients and second moments instead of low-rank steps
    gradient_by_peft: ClassVar[bool] = False  # PEFT computes a gradient from the examples, with its own code
    transform: ClassVar[str | None] = None  # function of the method's module, applied to the gradient before its SVD
    reads_weights: ClassVar[bool] = False  # needs the whole weight of every layer
    changes_base: ClassVar[bool] = False  # the base becomes W - s B A, with the values in conf/init/<method>.yaml
    trains_core: ClassVar[bool] = False  # only an r x r core between frozen factors is trained
    sets_ranks: ClassVar[bool] = False  # chooses the rank of each layer, see initialization.ranked_start
    steps_weights: ClassVar[bool] = False  # changes the weights themselves and has no adapter: full fine-tuning only
    causal_only: ClassVar[bool] = False  # works only with causal models
    needs_quantised: ClassVar[bool] = False  # works only with a quantised base
    unit_scaling: ClassVar[bool] = False  # s = 1: alpha is set to r, and rsLoRA is off
    from_training: ClassVar[
        dict[str, str]
    ] = {}  # keys that a run takes from its training if they are null: key -> meaning
    plain: ClassVar[bool] = False  # plain random adapters: also accepted by AdaLoRA and full fine-tuning
    choices: ClassVar[Choices] = {"dtype": ("fp32", "bf16")}
    ranges: ClassVar[Ranges] = {"seed": SEED}
    extra: ClassVar[str] = ""  # the optional dependencies of lora-one that contain ``packages``
    packages: ClassVar[dict[str, str]] = {}  # packages that the method needs: name -> module

    @property
    def module(self) -> str:
        """Return the file in initialization/methods/ that computes the factors."""
        return self.method

    @property
    def by_peft(self) -> bool:
        """Return whether PEFT computes the factors of all layers at once."""
        return False

    @property
    def shifts_base(self) -> bool:
        """Return whether the base becomes W - s B A with these settings."""
        return self.changes_base

    @property
    def zero_start(self) -> bool:
        """Return whether the settings make B zero, so that the adapters do not change the model at first."""
        return False

    @property
    def rearrangement(self) -> str | None:
        """Return the function of the method's module that changes the factors after the search for their scale."""
        return None

    @property
    def search_from(self) -> float | None:
        """Return the gamma at which the search for the scale starts; None: the scale is fixed."""
        return None

    @property
    def further_examples(self) -> int:
        """Return how many further training examples a search uses, if there are that many."""
        return 0

    @property
    def required_further(self) -> int:
        """Return how many of the further examples must exist, because the settings ask for them explicitly."""
        return 0

    @property
    def short_name(self) -> str:
        """Return the name of the method in a folder name."""
        return self.title

    def with_dora(self, name: str) -> str:
        """Return a name of the method for use with DoRA."""
        return f"DoRA-{name}"

    def title_with(self, dora: bool) -> str:
        """Return the title, with or without DoRA."""
        return self.with_dora(self.title) if dora else self.title

    def folder_parts(self, alpha: float) -> list[str]:
        """Return the main settings, and alpha, as they appear in a folder name."""
        return [f"a{alpha:g}"]

    def resolved(self) -> Self:
        """Return the settings with defaults in place of null, so that equal runs have equal settings and one folder."""
        return self

    def completed(self, first_step_size: Callable[[], float], examples: int | None = None) -> Self:
        """Return the settings with the values that depend on the training data.

        first_step_size: of the optimizer.  examples: number of training examples; None: unknown, so it stays null.
        """
        return self

    def remedy(self) -> str:
        """Return the advice for an initialisation that raised the loss."""
        return "set model.bf16=false, because a base in 16 bits rounds W - s B A"

    def check(self) -> None:
        """Check the values together. Raises UsageError."""

    def check_model(self, model: "ModelConfig") -> None:
        """Check that the method works with the model. Raises UsageError."""

    def check_rank(self, rank: int, key: str) -> None:
        """Check that the method works with the rank. key: its name in a message. Raises UsageError."""


@dataclass(frozen=True)
class ExampleSettings(MethodSettings):
    """Settings of a method that uses training examples.

    It uses bsz x iters examples; with do_subsampling, sub_size; if bsz and iters are null, the whole training set.
    """

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
        """Return the number of examples; None: the whole training set."""
        if self.do_subsampling:
            return self.sub_size
        return None if self.bsz is None else self.bsz * self.iters

    def check(self) -> None:
        super().check()
        if self.do_subsampling and self.sub_size is None:
            raise UsageError(
                "init.do_subsampling=true needs the number of examples: set init.sub_size=<number of examples>"
            )
        if self.sub_size is not None and not self.do_subsampling:
            raise UsageError(
                f"init.sub_size={self.sub_size} is used only with init.do_subsampling=true: add that, or remove "
                "init.sub_size"
            )
        if not self.do_subsampling and (self.bsz is None) != (self.iters is None):
            raise UsageError(
                f"init.bsz={self.bsz} and init.iters={self.iters}: set both to numbers (bsz x iters examples), or both "
                "to null (the whole training set)"
            )


@dataclass(frozen=True)
class WholeGradientSettings(ExampleSettings):
    """Settings of a method that uses the mean gradient over the examples, one whole gradient at a time."""

    reduction: str
    memory: str  # where gradients are stored: see initialization.holding.how_to_hold

    needs_gradient: ClassVar[bool] = True
    choices: ClassVar[Choices] = {"reduction": ("example", "token"), "memory": ("auto", "fast", "low")}


@dataclass(frozen=True)
class GradientSettings(WholeGradientSettings):
    """Settings of a method that uses the low-rank step of the mean gradient over the examples."""

    tolerance: float  # share of sigma_i^2 that each direction i of the low-rank step may miss

    ranges: ClassVar[Ranges] = TOLERANCE


@dataclass(frozen=True)
class PeftSettings(MethodSettings):
    """Settings of a method that PEFT computes, from the whole weights."""

    reads_weights: ClassVar[bool] = True

    @property
    def module(self) -> str:
        return "peft_methods"

    @property
    def by_peft(self) -> bool:
        return True


@dataclass(frozen=True)
class ScaledSettings(MethodSettings):
    """Settings of a method whose factors are multiplied by a scale; scale=stable divides by sqrt(gamma)."""

    scale: str | None  # null = the method's default, see resolved
    stable_gamma: float | None  # gamma of scale=stable; null = default_gamma

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
            return f"raise init.stable_gamma (now {self.gamma:g}), or set model.bf16=false if the base is in 16 bits"
        return super().remedy()

    def check(self) -> None:
        if self.scale not in self.scales:
            raise UsageError(
                f"init.scale={self.scale} is not a choice of init={self.method}; {nearest(self.scale, self.scales)}"
            )
        if self.scale != "stable" and self.stable_gamma is not None:
            raise UsageError(
                f"init.stable_gamma={self.stable_gamma} is used only with init.scale=stable, but "
                f"init.scale={self.scale}: remove one of the two"
            )
        super().check()


def filled_in(settings: Any, automatic: str) -> dict[str, Any]:
    """Return scale and gamma of a method's settings, with defaults in place of null.

    automatic: the default of ``scale``.
    """
    scale = settings.scale or automatic
    return {"scale": scale, "stable_gamma": settings.gamma if scale == "stable" else settings.stable_gamma}
