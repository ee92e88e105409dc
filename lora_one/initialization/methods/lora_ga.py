"""LoRA-GA (arXiv:2407.05000) as in the authors' code: singular vectors of the gradient, and the base W - s B A."""

import torch

from lora_one.config.methods.gradient import LoraGASettings
from lora_one.initialization.methods.scale import factor_scale
from lora_one.linalg import LowRank
from lora_one.types import AdapterFactors, LayerView


def factors(settings: LoraGASettings, layer: LayerView, step: LowRank) -> AdapterFactors:
    """Return orthonormal factors times a scale c; W becomes W - s B A, so the function does not change.

    With G = U diag(S) Vh, ``init.ga_direction`` chooses which of the 2 r leading vectors each factor gets:
    ArB2r: A = Vh[:r], B = U[r:2r].  A2rBr: A = Vh[r:2r], B = U[:r].  ArBr: A the odd ones, B the even ones
    (0, 2, ...).  random: disjoint random halves.
    ``init.scale`` chooses c (stable: m^1/4 / gamma^1/2, for both factors).
    If G has fewer than 2 r directions, the other vectors are random and orthonormal to them (``linalg.completed``).
    They are trained like the rest, and do not change the function either, because the base is changed.

    step: [G]_2r.  Returns B (m, r), A (r, n), fp32.
    """
    r = layer.rank
    order = torch.arange(2 * r)
    if settings.ga_direction == "ArB2r":
        for_A, for_B = order[:r], order[r:]
    elif settings.ga_direction == "A2rBr":
        for_A, for_B = order[r:], order[:r]
    elif settings.ga_direction == "ArBr":
        for_A, for_B = order[1::2], order[0::2]
    else:
        shuffled = torch.randperm(2 * r, generator=layer.generator)
        for_A, for_B = shuffled[:r], shuffled[r:]
    scale = factor_scale(settings, layer, stable=layer.shape[0] ** 0.25 / settings.gamma**0.5)
    return AdapterFactors(step.U[:, for_B] * scale, step.Vh[for_A] * scale, shift_base=True)
