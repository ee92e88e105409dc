"""Facts about a model: its kind, width, positions, weight shapes and stored weights."""

import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_one.config import RunConfig, with_core
from lora_one.config.schemas import ModelConfig
from lora_one.errors import RunError, UsageError
from lora_one.model_kinds import CAUSAL, ModelKind, kind_by_architecture
from lora_one.models.loading import load_config
from lora_one.models.location import local_folder


def kind_of(model: nn.Module) -> ModelKind:
    """Return the kind of a loaded model, with or without an adapter."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return kind_by_architecture([type(inner).__name__], inner.config)


def text_part(model: nn.Module) -> str:
    """Return the beginning of the names of the modules that process text: empty if all do.

    In a model that also reads images or sound these are the siblings of the token embeddings.
    """
    config = getattr(model, "config", None)
    if all(getattr(config, f"{other}_config", None) is None for other in ("vision", "audio")):
        return ""
    words = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is words)
    return name[: name.rfind(".") + 1]


def kind_of_checkpoint(name: str, revision: str | None = None) -> ModelKind:
    """Return the kind of a saved model, from its configuration.

    Raises UsageError: an encoder without a classification head, which neither generates text nor chooses a class.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    config = load_config(name, revision)
    classes = config.architectures or ()
    kind = kind_by_architecture(classes, config)
    generates = getattr(config, "is_decoder", False) or any("CausalLM" in each or "LMHead" in each for each in classes)
    if kind is CAUSAL and not generates and config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        raise UsageError(
            f"model {name} is an encoder without a classification head (its config.json says: "
            f"{', '.join(classes) or config.model_type}): pass a model with a head, or the run or adapter that trained "
            "one"
        )
    return kind


def with_rank(run: RunConfig) -> RunConfig:
    """Return the run with the rank set by ``peft.lora_relative_r``: this fraction of the model's width, at least 1."""
    share = run.peft.lora_relative_r
    if share is None:
        return run
    width = load_config(run.model.name, run.model.revision).get_text_config().hidden_size
    peft = dataclasses.replace(run.peft, lora_r=max(1, int(share * width)))
    return with_core(dataclasses.replace(run, peft=peft))


def check_positions(model: nn.Module, settings: ModelConfig) -> None:
    """Raise UsageError if the model has learnt position embeddings, but fewer than ``model.max_length``."""
    places = learnt_positions(model)
    if places is not None and settings.max_length > places:
        raise UsageError(
            f"model.max_length={settings.max_length} is more than the {places} position embeddings of "
            f"{settings.name}: set model.max_length={places} or less"
        )


def learnt_positions(model: nn.Module) -> int | None:
    """Return the number of learnt position embeddings; None: the model computes its positions."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in ("position_embeddings", "wpe"):
            unused = 0 if module.padding_idx is None else module.padding_idx + 1  # RoBERTa's positions start there
            return module.num_embeddings - unused
    return None


def weight_shape(layer: nn.Module) -> tuple[int, int]:
    """Return (m, n) of a layer's W, also for the Conv1D of transformers, which stores W^T."""
    return (layer.nf, layer.nx) if hasattr(layer, "nf") else (layer.out_features, layer.in_features)


def original_weights(model: nn.Module, name: str, revision: str | None = None) -> Callable[[str], Tensor]:
    """Return a function that reads a layer's weight W (m, n), fp32, from the model's safetensors files, by its name.

    model: the quantised model.  name, revision: of the files.
    That function raises RunError: the files do not contain the weight.
    """
    transposed = cache(conv1d_layers)
    folder = local_folder(name)
    if folder is None:
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(name, revision=revision, allow_patterns="*.safetensors"))
    files = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            files |= dict.fromkeys(opened.keys(), file)

    def weight(layer: str) -> Tensor:
        key = f"{layer}.weight"
        if key not in files:
            raise RunError(
                f"the safetensors files in {folder} do not contain {key}: save the model again with the installed "
                "version of transformers"
            )
        with safe_open(files[key], "pt") as opened:
            stored = opened.get_tensor(key).float()
        return stored.T if layer in transposed(model) else stored

    return weight


def conv1d_layers(model: nn.Module) -> set[str]:
    """Return the names of the layers whose unquantised form is transformers' Conv1D, which stores W^T.

    The quantised form is an ordinary linear layer, so a model of the same configuration is built, without weights.
    """
    with torch.device("meta"):
        plain = type(model)(model.config)
    return {name for name, layer in plain.named_modules() if isinstance(layer, Conv1D)}
