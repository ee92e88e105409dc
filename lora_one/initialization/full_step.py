"""One step of gradient descent in the weights themselves: W - eta G for every target layer, without adapters."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_one.adaptation.layers import refuse_quantised, relative_change
from lora_one.distributed import Processes
from lora_one.errors import UsageError
from lora_one.initialization.forward_batches import batches_loss, forward_batches
from lora_one.initialization.gradients import mean_gradients, wide_dtype
from lora_one.initialization.scale_search import searched
from lora_one.initialization.solution import Probe, Solution, Start
from lora_one.initialization.start import as_run_errors
from lora_one.linalg import full_precision
from lora_one.losses import Batch, Reduction
from lora_one.models import weight_shape


@full_precision()
def full_step(base: nn.Module, layers: Mapping[str, nn.Module], probe: Probe, eta: float | None) -> Start:
    """Change the weights W (m, n) of the layers to W - eta G, with the mean gradient G over the probe's examples.

    eta: None: searched for, as the scale of an adapter; the solution's gamma is 1 / eta.  The base is frozen; W, G and
    W - eta G of all layers are in memory together.
    Raises RunError: the loss is not finite, or a layer takes no part in it. UsageError: a weight is quantised, sharded
    or used by two layers.
    """
    for name, layer in layers.items():
        refuse_quantised(name, layer)
    if len({id(layer.weight) for layer in layers.values()}) < len(layers):
        raise UsageError(
            "two of the target layers have the same weight, so W - eta G is not defined for each of them: name other "
            "layers in peft.lora_target_modules"
        )
    gradients: dict[str, Tensor] = {}
    base.requires_grad_(False)
    with as_run_errors():
        report = mean_gradients(
            base,
            dict(layers),
            probe.batches,
            probe.reduction,
            gradients.__setitem__,
            checkpointing=probe.settings.checkpointing,
        )
        step = FullStep.of(base, layers, gradients, forward_batches(base, probe.search or probe.batches), probe)
        losses: dict[float, float] = {}
        if eta is None:
            eta, losses = searched(step, report.loss, step.slope, elsewhere=bool(probe.search))
    step.take(eta)
    solution = Solution(
        {},
        examples=report,
        predicted_decrease=eta * step.slope,
        searched={1 / tried: loss if math.isfinite(loss) else None for tried, loss in losses.items()},
        gamma=1 / eta,
        loss=losses.get(eta) if not probe.search else None,
        searched_on=sum(len(batch["labels"]) for batch in probe.search or ()) if losses else 0,
    )
    return Start(solution, step.relative_shift(eta), {})


@dataclass(frozen=True)
class FullStep:
    """The model with W - eta G in its layers. batches, reduction: of its loss.

    weights: the original W, as stored in each layer.  gradients: G in the same form, on every process.
    """

    model: nn.Module
    layers: Mapping[str, nn.Module]
    weights: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    batches: Sequence[Batch]
    reduction: Reduction

    @classmethod
    def of(
        cls,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        gradients: Mapping[str, Tensor],
        batches: Sequence[Batch],
        probe: Probe,
    ) -> "FullStep":
        """Return the step. gradients: G (m, n) of the layers that this process owns, see ``mean_gradients``."""
        processes, found = Processes.current(), {}
        for owner, name in processes.by_turns(list(layers)):
            layer = layers[name]
            G = gradients.get(name)
            if G is None:
                G = torch.zeros(weight_shape(layer), dtype=wide_dtype(model), device=layer.weight.device)
            G = processes.from_owner(owner, G)
            found[name] = G.T if isinstance(layer, Conv1D) else G
        weights = {name: layer.weight.detach().clone() for name, layer in layers.items()}
        return cls(model, layers, weights, found, batches, probe.reduction)

    @property
    def slope(self) -> float:
        """Return the sum over the layers of ||G||^2, the first-order decrease of the loss for eta = 1."""
        return sum(float(G.double().square().sum()) for G in self.gradients.values())

    @torch.no_grad()
    def take(self, eta: float) -> None:
        """Write W - eta G, computed in the dtype of G and rounded once."""
        for name, layer in self.layers.items():
            G = self.gradients[name]
            layer.weight.copy_(self.weights[name].to(G.dtype) - eta * G)

    def loss_at(self, eta: float) -> float:
        """Return the loss with W - eta G."""
        self.take(eta)
        return batches_loss(self.model, self.batches, self.reduction)

    def loss_at_zero(self) -> float:
        """Return the loss with the original weights."""
        return self.loss_at(0.0)

    def relative_shift(self, eta: float) -> dict[str, float]:
        """Return ||eta G||_F / ||W||_F by layer, see `relative_change`."""
        return {
            name: relative_change(float(eta * self.gradients[name].norm()), float(self.weights[name].norm()))
            for name in self.layers
        }
