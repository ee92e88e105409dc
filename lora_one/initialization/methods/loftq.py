"""LoftQ (arXiv:2310.08659): the adapter makes up for what quantising the base lost."""

from lora_one.config.methods.weights import LoftqSettings
from lora_one.linalg import truncated_svd
from lora_one.types import AdapterFactors, LayerView


def factors(settings: LoftqSettings, layer: LayerView, step: None = None) -> AdapterFactors:
    """With Q the quantised weight: s B A = [W - Q]_r = U diag(S) Vh, B = U (S / s)^1/2, A = (S / s)^1/2 Vh.

    That is the paper's Algorithm 1 with T = 1: with more rounds Q would be that of another matrix than W, and the
    adapter would belong to no base that anyone else can quantise. PEFT's LoftQ leaves s out of its product.

    Returns B (m, r), A (r, n), fp32; Q is not changed.
    """
    quantised = layer.weight()
    residual = layer.original().to(quantised.device) - quantised
    lost = truncated_svd(residual, layer.rank, tolerance=settings.tolerance, generator=layer.generator)
    root = (lost.S / layer.scaling).sqrt()
    return AdapterFactors(lost.U * root, root[:, None] * lost.Vh)
