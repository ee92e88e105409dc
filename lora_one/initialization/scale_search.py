"""The search for the scale of a solution: a line search over the loss of the model with scaled factors."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from peft import PeftModel

from lora_one.adaptation.layers import lora_layers, put
from lora_one.adaptation.wrapping import quiet_peft
from lora_one.initialization.forward_batches import batches_loss, forward_batches
from lora_one.initialization.search import EVALUATIONS, line_search
from lora_one.initialization.solution import Probe, Solution
from lora_one.losses import Batch, Reduction
from lora_one.types import AdapterFactors


@dataclass(frozen=True)
class ScaledFactors:
    """The model with multiples of a solution's B A. batches, reduction: of its loss."""

    model: PeftModel
    factors: dict[str, AdapterFactors]
    batches: Sequence[Batch]
    reduction: Reduction

    def times(self, multiple: float) -> dict[str, AdapterFactors]:
        """Return the factors that give ``multiple`` x B A, both multiplied by the square root."""
        root = math.sqrt(multiple)
        return {name: replace(found, B=found.B * root, A=found.A * root) for name, found in self.factors.items()}

    def loss_at(self, multiple: float) -> float:
        """Write the scaled factors into the model and return the loss."""
        layers = lora_layers(self.model)
        for name, found in self.times(multiple).items():
            put(layers[name], found)
        return batches_loss(self.model, self.batches, self.reduction)

    def loss_at_zero(self) -> float:
        """Return the loss without adapters."""
        with quiet_peft(), self.model.disable_adapter():
            return batches_loss(self.model, self.batches, self.reduction)


class Scaled(Protocol):
    """A model with a multiple of a change of its weights."""

    def loss_at(self, multiple: float) -> float:
        """Return the loss with this multiple, which stays in the model."""

    def loss_at_zero(self) -> float:
        """Return the loss without the change."""


def searched(scaled: Scaled, loss: float, decrease: float, *, elsewhere: bool) -> tuple[float, dict[float, float]]:
    """Return the multiple with the lowest loss, and the losses of all tried ones; see ``line_search``.

    loss, decrease: at zero, on the examples of the gradient.  elsewhere: the loss is measured on other examples.
    """
    if not elsewhere:
        return line_search(scaled.loss_at, loss, decrease, EVALUATIONS)
    return line_search(scaled.loss_at, scaled.loss_at_zero(), decrease, EVALUATIONS - 1)  # loss_at_zero is one of them


def with_searched_scale(model: PeftModel, solution: Solution, search_from: float, probe: Probe) -> Solution:
    """Return the solution at the gamma with the lowest loss found by a line search; B A is proportional to 1 / gamma.

    search_from: gamma of the given solution.
    """
    scaled = ScaledFactors(
        model, solution.factors, forward_batches(model, probe.search or probe.batches), probe.reduction
    )
    multiple, losses = searched(
        scaled, solution.examples.loss, solution.predicted_decrease, elsewhere=bool(probe.search)
    )
    return replace(
        solution,
        factors=scaled.times(multiple),
        predicted_decrease=solution.predicted_decrease * multiple,
        searched={search_from / tried: loss if math.isfinite(loss) else None for tried, loss in sorted(losses.items())},
        gamma=search_from / multiple,
        loss=None if probe.search else losses[multiple],
        searched_on=sum(len(batch["labels"]) for batch in probe.search or ()),
    )
