"""PiSSA (arXiv:2404.02948) by our randomised SVD; PEFT's own variants are in peft_methods.py."""

from lora_one.config.methods.weights import PissaSettings
from lora_one.initialization.methods.svd import principal_factors
from lora_one.types import AdapterFactors, LayerView


def factors(settings: PissaSettings, layer: LayerView, step: None = None) -> AdapterFactors:
    """s B A = [W]_r, the best rank-r approximation of W, and W becomes W - s B A."""
    return principal_factors(layer, settings.tolerance)
