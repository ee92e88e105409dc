"""MiLoRA (arXiv:2406.09044): the adapter starts as the smallest part of the weight."""

from lora_one.config.methods.weights import MiloraSettings
from lora_one.linalg import last_triplets, usable
from lora_one.types import AdapterFactors, LayerView


def factors(settings: MiloraSettings, layer: LayerView, step: None = None) -> AdapterFactors:
    """Return B = U (S / s)^1/2 and A = (S / s)^1/2 Vh with the last r triplets of W; W becomes W - s B A.

    s B A is the smallest of the parts of W that r triplets make up, and the base keeps the others.

    B (m, r) and A (r, n) are fp32. Raises ValueError: one of the last r singular values is zero. Its column of B and
    row of A would both be zero, and get no gradient in the whole training.
    """
    W, largest = last_triplets(layer.weight(), layer.rank)
    found = usable(W.S, largest)
    if found < layer.rank:
        raise ValueError(
            f"{layer.rank - found} of the last {layer.rank} singular values of {layer.name} are zero, so their "
            f"directions could not be trained by {settings.title}: remove the layer from peft.lora_target_modules, or "
            "set init=lora"
        )
    root = (W.S / layer.scaling).sqrt()
    return AdapterFactors(W.U * root, (W.Vh.T * root).T, shift_base=True)
