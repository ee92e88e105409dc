"""What an initialisation reads and returns: the probe, the solution, and the start that it becomes in a model."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lora_one.adaptation.layers import FactorPairs
from lora_one.initialization.backward import GradientReport
from lora_one.initialization.low_rank_step import StepSettings
from lora_one.losses import Batch, Reduction
from lora_one.types import AdapterFactors


@dataclass(frozen=True)
class Probe:
    """The examples that a method uses: collated batches, how their losses are averaged, and settings of the SVD.

    vectors: the solution contains the leading singular vectors of the gradients.
    search: other batches for the search for the scale; None: the same batches.
    """

    batches: Sequence[Batch]
    reduction: Reduction
    settings: StepSettings = field(default_factory=StepSettings)
    vectors: bool = False
    search: Sequence[Batch] | None = None


@dataclass(frozen=True)
class Solution:
    """The result of an initialisation: the factors of each layer in fp32, and figures for run.json.

    energies: captured share ||[G]_r||^2 / ||G||^2 by layer.  examples: None if the method uses no examples.
    predicted_decrease: first-order decrease of the loss on the examples, - sum over layers <G, s B A>; only of methods
    that use a gradient.
    searched: gamma -> loss (None: not finite) of a search for the scale.  gamma: the one that was chosen.
    loss: on the examples, with these factors, if a search has measured it.
    searched_on: number of other examples used by the search; 0: it used those of the gradient.
    cached: read from the cache.  seconds: what it cost when it was computed, if it was read from there; otherwise 0.
    vectors: (U_r, Vh_r) of [G]_r by layer, if the probe asks for them.
    """

    factors: dict[str, AdapterFactors]
    energies: dict[str, float] = field(default_factory=dict)
    examples: GradientReport | None = None
    predicted_decrease: float | None = None
    searched: dict[float, float | None] = field(default_factory=dict)
    gamma: float | None = None
    cached: bool = False
    seconds: float = 0.0
    vectors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    loss: float | None = None
    searched_on: int = 0

    @property
    def ranks(self) -> dict[str, int]:
        """Return the rank of each layer."""
        return {name: found.A.shape[0] for name, found in self.factors.items()}


@dataclass(frozen=True)
class Start:
    """A solution that was written into a model.

    relative_shift: ||s B A||_F / ||W||_F by layer.
    initial_factors: (B0, A0) of the layers whose base became W - s B0 A0; they are needed to save and to resume.
    """

    solution: Solution
    relative_shift: dict[str, float]
    initial_factors: FactorPairs
