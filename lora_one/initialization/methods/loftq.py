"""LoftQ (arXiv:2310.08659): the adapter compensates the quantisation error of the base."""

from lora_one.config.methods.weights import LoftqSettings
from lora_one.linalg import truncated_svd
from lora_one.types import AdapterFactors, LayerView


def factors(settings: LoftqSettings, layer: LayerView, step: None = None) -> AdapterFactors:
    """Return B = U (S / s)^1/2 and A = (S / s)^1/2 Vh with s B A = [W - Q]_r = U diag(S) Vh, Q the quantised weight.

    This is the paper's Algorithm 1 with T = 1. With more rounds, Q would be the quantisation of another matrix than W,
    and the adapter would not fit the quantised base that others get. PEFT's LoftQ omits s from its product.

    B (m, r) and A (r, n) are fp32; Q is not changed.
    """
    quantised = layer.weight()
    residual = layer.original().to(quantised.device) - quantised
    lost = truncated_svd(residual, layer.rank, tolerance=settings.tolerance, generator=layer.generator)
    root = (lost.S / layer.scaling).sqrt()
    return AdapterFactors(lost.U * root, root[:, None] * lost.Vh)
