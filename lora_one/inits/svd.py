"""From the weight's own leading singular vectors, as PiSSA (arXiv:2404.02948) does, at several scales."""

from lora_one.config.schemas import PissaInit, SvdInit
from lora_one.linalg import LowRank, truncated_svd
from lora_one.types import AdapterFactors, LayerView


def svd_factors(init: SvdInit, layer: LayerView, step: None = None) -> AdapterFactors:
    """With W = U diag(S) Vh: B = U_r diag(b), A = diag(a) Vh_r; W becomes W - s B A.

    default: a = b = (S / s)^1/2, so s B A = [W]_r, which is PiSSA.
    stable: b = m^1/4 / gamma^1/2, a = n^1/4 / gamma^1/2.  unit: a = b = 1.
    normalized: a = b = (S / sum of the r leading S)^1/2.
    """
    W = _weight_svd(init, layer)
    rows, columns = layer.shape
    by_scale = {
        "default": ((W.S / layer.scaling).sqrt(), (W.S / layer.scaling).sqrt()),
        "stable": (rows**0.25 / init.gamma**0.5, columns**0.25 / init.gamma**0.5),
        "unit": (1.0, 1.0),
        "normalized": ((W.S / W.S.sum()).sqrt(), (W.S / W.S.sum()).sqrt()),
    }
    b, a = by_scale[init.scale]
    return AdapterFactors(W.U * b, (W.Vh.T * a).T, shift_base=True)


def pissa_factors(init: PissaInit, layer: LayerView, step: None = None) -> AdapterFactors:
    """PiSSA: B = U_r (S_r / s)^1/2, A = (S_r / s)^1/2 Vh_r, the same as ``svd_factors`` with scale=default."""
    W = _weight_svd(init, layer)
    root = (W.S / layer.scaling).sqrt()
    return AdapterFactors(W.U * root, root[:, None] * W.Vh, shift_base=True)


def _weight_svd(init: SvdInit | PissaInit, layer: LayerView) -> LowRank:
    return truncated_svd(layer.weight(), layer.rank, tolerance=init.tolerance, generator=layer.generator)
