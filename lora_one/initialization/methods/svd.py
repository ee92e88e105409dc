"""Leading singular vectors of the weight, with several scales; scale=default is PiSSA (arXiv:2404.02948)."""

from lora_one.config.methods.weights import SvdSettings
from lora_one.linalg import truncated_svd
from lora_one.types import AdapterFactors, LayerView


def factors(settings: SvdSettings, layer: LayerView, step: None = None) -> AdapterFactors:
    """Return B = U_r diag(b) and A = diag(a) Vh_r with W = U diag(S) Vh; W becomes W - s B A.

    default: a = b = (S / s)^1/2, so s B A = [W]_r, see ``principal_factors``.
    stable: b = m^1/4 / gamma^1/2, a = n^1/4 / gamma^1/2.  unit: a = b = 1.
    normalized: a = b = (S / sum of the r leading S)^1/2.
    """
    if settings.scale == "default":
        return principal_factors(layer, settings.tolerance)
    W = truncated_svd(layer.weight(), layer.rank, tolerance=settings.tolerance, generator=layer.generator)
    rows, columns = layer.shape
    by_scale = {
        "stable": (rows**0.25 / settings.gamma**0.5, columns**0.25 / settings.gamma**0.5),
        "unit": (1.0, 1.0),
        "normalized": ((W.S / W.S.sum()).sqrt(), (W.S / W.S.sum()).sqrt()),
    }
    b, a = by_scale[settings.scale]
    return AdapterFactors(W.U * b, (W.Vh.T * a).T, shift_base=True)


def principal_factors(layer: LayerView, tolerance: float) -> AdapterFactors:
    """Return B = U_r (S / s)^1/2 and A = (S / s)^1/2 Vh_r, so s B A = [W]_r; W becomes W - s B A."""
    W = truncated_svd(layer.weight(), layer.rank, tolerance=tolerance, generator=layer.generator)
    root = (W.S / layer.scaling).sqrt()
    return AdapterFactors(W.U * root, (W.Vh.T * root).T, shift_base=True)
