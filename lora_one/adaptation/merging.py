"""Merge adapters into the model, and save plain Hugging Face folders."""

from collections import Counter
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
    untie(model)
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


def untie(model: PeftModel) -> None:
    """Give every module that shares the weight of an adapted layer its own one; merging would change them all.

    An adapter from elsewhere may adapt the output layer or the embeddings of a model in which these are one weight.
    """
    adapted = [layer.get_base_layer() for layer in model.modules() if isinstance(layer, LoraLayer)]
    weights = {id(layer.weight) for layer in adapted if isinstance(getattr(layer, "weight", None), nn.Parameter)}
    users = [module for module in model.modules() if id(module._parameters.get("weight")) in weights]
    uses = Counter(id(module.weight) for module in users)
    words = model.get_base_model().get_input_embeddings()
    if uses[id(words.weight)] > 1:
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
    for module in users:
        if uses[id(module.weight)] > 1:
            module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)


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
