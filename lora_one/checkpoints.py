"""Adapters and merged models on disk: a folder that plain PEFT loads, a folder that anything loads."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from lora_one.adapters import lora_layers
from lora_one.errors import RunError, UsageError


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Write into a hidden folder beside; it takes the name ``path`` when all of it is there.

    Raises RunError when it cannot be written (no space left, say); what stood at ``path`` is then untouched.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
            content = Path(scratch) / path.name
            content.mkdir()
            yield content
            if path.exists():
                shutil.rmtree(path)
            content.rename(path)
    except OSError as error:
        raise RunError(
            f"{path} cannot be written ({error.strerror or error}): free space or give another folder"
        ) from error


def save_adapter(model: PeftModel, path: Path) -> None:
    """The PEFT folder: adapter_config.json and the factors as trained, bit for bit."""
    with whole_folder(path) as folder:
        model.save_pretrained(folder)


def load_adapter(base: nn.Module, path: Path, *, trainable: bool = False) -> PeftModel:
    """The base with a saved adapter. Raises UsageError: no adapter there, or one of another model."""
    if not (path / "adapter_config.json").exists():
        raise UsageError(f"{path} holds no adapter_config.json: give the adapter/ folder of a run")
    try:
        return PeftModel.from_pretrained(base, str(path), is_trainable=trainable)
    except (ValueError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"the adapter in {path} does not fit this model ({reason}): give the base it was trained on"
        ) from error


@torch.no_grad()
def merge_adapter(model: PeftModel) -> nn.Module:
    """The plain model with W + s B A in every adapted layer, in the base's dtype.

    The sum is taken in fp32 (fp64 for an fp64 base), layer by layer, and rounded once. The model is consumed.
    """
    for layer in lora_layers(model).values():
        base = layer.get_base_layer()
        dtype = base.weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        base.weight.data = base.weight.data.to(wide)
        for factor in (*layer.lora_A.values(), *layer.lora_B.values()):
            factor.weight.data = factor.weight.data.to(wide)
        layer.merge()
        base.weight.data = base.weight.data.to(dtype)
    merged = model.unload()
    return merged


def save_merged(model: nn.Module, tokenizer: Any, path: Path) -> None:
    """A plain Hugging Face folder, weights and tokenizer."""
    with whole_folder(path) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
