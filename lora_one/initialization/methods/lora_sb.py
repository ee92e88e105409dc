"""LoRA-SB (arXiv:2411.19557): one sign step's singular vectors, frozen; only the r x r core between them trains."""

import torch
from torch import Tensor

from lora_one.config.methods.gradient import LoraSBSettings
from lora_one.linalg import LowRank
from lora_one.types import AdapterFactors, LayerView


def descent_signs(G: Tensor) -> Tensor:
    """-sign(G): the direction of Adam's first step."""
    return -torch.sign(G)


def factors(settings: LoraSBSettings, layer: LayerView, step: LowRank) -> AdapterFactors:
    """B R A = [dW]_r with dW = -eta sign(G) = U diag(S) Vh: B = U_r, R = diag(S_r), A = Vh_r; W is not changed.

    B and A are orthonormal and stay; R trains, with s = 1.  ``init.eta`` must be a number: a run fills in
    null (training.loop.first_step_size).

    step: [-sign(G)]_r, so its singular values are those of dW over eta.  Returns B (m, r), A (r, n), R (r, r), fp32.
    """
    assert settings.eta is not None, "the run knows the learning rate of its first step"
    return AdapterFactors(step.U, step.Vh, R=torch.diag(settings.eta * step.S))
