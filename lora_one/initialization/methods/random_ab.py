"""Init[AB] (arXiv:2505.23194): both factors are random and not zero."""

import torch

from lora_one.config.methods.plain import RandomAbSettings
from lora_one.types import AdapterFactors, LayerView


def factors(settings: RandomAbSettings, layer: LayerView, step: None = None) -> AdapterFactors:
    """Return B and A with entries uniform in +-c/sqrt(n), n the columns of W for both factors, c = ``init.bound``.

    E ||B A||_F^2 = c^4 m r / (9 n). With ``init.reset`` the base becomes W - s B A, so the function does not change;
    without it the model starts from W + s B A.  B (m, r) and A (r, n) are fp32.
    """
    m, n = layer.shape
    c = settings.bound / n**0.5
    A = torch.empty(layer.rank, n).uniform_(-c, c, generator=layer.generator)
    B = torch.empty(m, layer.rank).uniform_(-c, c, generator=layer.generator)
    return AdapterFactors(B, A, shift_base=settings.reset)
