"""LoRA-SB (arXiv:2411.19557): frozen singular vectors of one sign step; only the r x r core between them is trained."""

import torch
from torch import Tensor

from lora_one.config.methods.gradient import LoraSBSettings
from lora_one.linalg import LowRank
from lora_one.types import AdapterFactors, LayerView


def descent_signs(G: Tensor) -> Tensor:
    """Return -sign(G), the direction of Adam's first step."""
    return -torch.sign(G)


def factors(settings: LoraSBSettings, layer: LayerView, step: LowRank) -> AdapterFactors:
    """Return B = U_r, R = diag(S_r) and A = Vh_r, so B R A = [dW]_r with dW = -eta sign(G) = U diag(S) Vh.

    B and A are orthonormal and frozen; R is trained, with s = 1. W is not changed. ``init.eta`` must be a number: a run
    replaces null (training.schedule.first_step_size).

    step: [-sign(G)]_r, whose singular values are those of dW divided by eta.  B (m, r), A (r, n) and R (r, r) are fp32.
    """
    assert settings.eta is not None, "a run sets eta with settings.completed"
    return AdapterFactors(step.U, step.Vh, R=torch.diag(settings.eta * step.S))
