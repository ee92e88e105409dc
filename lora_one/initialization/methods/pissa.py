"""PiSSA (arXiv:2404.02948) with our randomised SVD; PEFT's variants are in peft_methods.py."""

from lora_one.config.methods.weights import PissaSettings
from lora_one.initialization.methods.svd import principal_factors
from lora_one.types import AdapterFactors, LayerView


def factors(settings: PissaSettings, layer: LayerView, step: None = None) -> AdapterFactors:
    """Return factors with s B A = [W]_r, the best rank-r approximation of W; W becomes W - s B A."""
    return principal_factors(layer, settings.tolerance)
