"""Merge adapters into the model, and save plain Hugging Face folders."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from lora_one.adaptation.layers import lora_layers
from lora_one.adaptation.wrapping import narrowed
from lora_one.files import whole_folder
from lora_one.linalg import full_precision
from lora_one.quiet import quiet_weights


@full_precision()
@torch.no_grad()
def merge_adapter(model: PeftModel) -> nn.Module:
    """Return the plain model with W + s B A in every adapted layer, in the base's dtype.

    The sum is computed in fp32 (fp64 for an fp64 base), layer by layer, and rounded once. PEFT merges what is
    not a linear layer in an adapter from elsewhere (an embedding, fused experts). The given model cannot be used
    afterwards.
    """
    linear = list(lora_layers(model).values())
    untie(model, [layer.get_base_layer() for layer in linear])
    for layer in list(model.modules()):
        if isinstance(layer, LoraLayer) and layer not in linear:
            layer.merge()
    for layer in linear:
        base = layer.get_base_layer()
        dtype = base.weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        base.weight.data = base.weight.data.to(wide)
        for factor in (*layer.lora_A.values(), *layer.lora_B.values(), *layer.lora_magnitude_vector.values()):
            factor.to(wide)
        layer.merge()
        base.weight.data = base.weight.data.to(dtype)
    narrowed(model)
    return model.unload()


def untie(model: PeftModel, adapted: Sequence[nn.Module]) -> None:
    """Give each adapted layer that shares its weight its own one; merging would change the others too.

    An adapter from elsewhere may adapt an output layer whose weight is that of the input embeddings.
    """
    uses = Counter(id(weight) for module in model.modules() for weight in module.parameters(recurse=False))
    words = model.get_base_model().get_input_embeddings().weight
    for layer in adapted:
        if uses[id(layer.weight)] > 1:
            if layer.weight is words:
                model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
            layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)


def bare(model: PeftModel) -> nn.Module:
    """Return the model without its adapters; fully trained modules keep their trained values, in the base's dtype."""
    narrowed(model)
    return model.unload()


def dequantized(base: nn.Module) -> nn.Module:
    """Return the base with quantised layers converted to plain linear layers of the same values."""
    return base.dequantize(dtype=base.dtype) if getattr(base, "is_quantized", False) else base


@quiet_weights()
def save_merged(model: nn.Module, tokenizer: Any, path: Path) -> None:
    """Write a plain Hugging Face folder with weights and tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # a call that cuts or pads leaves that in the tokenizer, and so in its file
        backend.no_truncation()
        backend.no_padding()
    with whole_folder(path) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
