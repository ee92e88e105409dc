"""From the weight's own leading singular vectors, as PiSSA (arXiv:2404.02948) does, at several scales."""

from lora_one.config.schemas import SvdInit
from lora_one.linalg import truncated_svd
from lora_one.types import AdapterFactors, LayerView


def svd_factors(init: SvdInit, layer: LayerView, step: None = None) -> AdapterFactors:
    """With W = U diag(S) Vh: B = U_r diag(b), A = diag(a) Vh_r; W becomes W - s B A.

    default: a = b = (S / s)^1/2, so s B A = [W]_r, which is PiSSA.
    stable: b = m^1/4 / gamma^1/2, a = n^1/4 / gamma^1/2.  unit: a = b = 1.
    normalized: a = b = (S / sum of the r leading S)^1/2.
    """
    W = truncated_svd(layer.weight(), layer.rank, tolerance=init.tolerance, generator=layer.generator)
    rows, columns = layer.shape
    by_scale = {
        "default": ((W.S / layer.scaling).sqrt(), (W.S / layer.scaling).sqrt()),
        "stable": (rows**0.25 / init.gamma**0.5, columns**0.25 / init.gamma**0.5),
        "unit": (1.0, 1.0),
        "normalized": ((W.S / W.S.sum()).sqrt(), (W.S / W.S.sum()).sqrt()),
    }
    b, a = by_scale[init.scale]
    return AdapterFactors(W.U * b, (W.Vh.T * a).T, shift_base=True)
