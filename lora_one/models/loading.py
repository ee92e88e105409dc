"""Load tokenizers, configurations and models, optionally quantised or sharded."""

import importlib
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from lora_one.errors import RunError, UsageError
from lora_one.model_kinds import CAUSAL, CLASSIFIER, MODEL_KINDS, kind_by_architecture
from lora_one.models.location import check_weights, commit_of, local_folder, source_of
from lora_one.quiet import quiet_weights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def device(wanted: str | None = None) -> torch.device:
    """Return the wanted device, by default the accelerator if there is one. Raises UsageError: it is not available."""
    if wanted is not None:
        try:
            return torch.empty(0, device=wanted).device
        except (RuntimeError, AssertionError) as error:
            raise UsageError(
                f"device {wanted} is not available on this machine: choose another one (cpu always works)"
            ) from error
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps") if torch.backends.mps.is_available() else torch.device("cpu")


def attentions_for(dtype: torch.dtype | str, where: torch.device) -> list[str]:
    """Return the implementations of attention to try, fastest first; not every model has the first two.

    flash_attention_2: only if it is installed, the device is CUDA and the dtype has 16 bits.  sdpa: torch's.
    """
    flash = importlib.util.find_spec("flash_attn") and where.type == "cuda"
    return ["flash_attention_2"] * bool(flash and dtype in (torch.bfloat16, torch.float16)) + ["sdpa", "eager"]


def load_tokenizer(name: str, revision: str | None = None, model_type: str = CAUSAL.name) -> Any:
    """Load the tokenizer of a model.

    Raises RunError: it cannot be loaded, or it has no end-of-sequence token (for a classification head, a separator
    token is enough).
    """
    from transformers import AutoTokenizer

    source, options = source_of(name, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        raise RunError(cannot_load(name, "tokenizer", error)) from error
    separated = MODEL_KINDS[model_type].has_head and tokenizer.sep_token_id is not None
    if tokenizer.eos_token_id is None and not separated:
        raise RunError(
            f"the tokenizer of model {name} has no end-of-sequence token, which model.type={model_type} needs: set "
            "eos_token in the tokenizer's files, or choose another model"
        )
    return tokenizer


def load_config(name: str, revision: str | None = None) -> Any:
    """Return the model's configuration (of transformers). Raises RunError: it is missing or broken."""
    from transformers import AutoConfig

    source, options = source_of(name, revision)
    try:
        return AutoConfig.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        raise RunError(cannot_load(name, "configuration", error)) from error


def generation_settings(name: str, config: Any, revision: str | None = None) -> Any:
    """Return the generation settings that a model of this name is loaded with (GenerationConfig of transformers).

    config: its configuration, from which they are derived if the checkpoint has none.
    """
    from transformers import GenerationConfig

    source, options = source_of(name, revision)
    try:
        return GenerationConfig.from_pretrained(source, **options)
    except OSError:
        return GenerationConfig.from_model_config(config)


@quiet_weights()
def load_model(
    name: str,
    revision: str | None = None,
    *,
    dtype: str = "auto",
    where: str | None = None,
    quantization: str | None = None,
    model_type: str = CAUSAL.name,
    labels: Sequence[str] | None = None,
    pad_id: int | None = None,
    shards: int = 1,
    copies: int = 1,
) -> nn.Module:
    """Load a frozen model in evaluation mode.

    dtype: fp32, bf16, fp16, or "auto" for the stored one.  where: the device; None: the accelerator if there is one.
    model_type: a name in MODEL_KINDS.  labels: the words of a classification head, one for each output; None: those
    of the checkpoint. If the checkpoint has no head, it is initialised with torch's random numbers.
    pad_id: the padding token of the batches; only a classification head needs it.
    quantization: "nf4" (4 bit, blocks of 64) or "int8", by bitsandbytes, of all linear layers except the head.
    shards: the number of processes that share one copy of the weights, each with one part (FSDP).
    copies: the number of such groups, each of consecutive ranks (HSDP).
    Raises UsageError: a folder without weights.  RunError: not found, broken, or too large for the device.
    """
    from transformers.distributed import DistributedConfig

    check_weights(name)
    source, options = source_of(name, revision)
    if labels is not None:
        words = dict(enumerate(labels))
        options |= {"id2label": words, "label2id": {word: place for place, word in words.items()}}
    if shards > 1:
        replicas = {"dp_replicate_size": copies} if copies > 1 else {}  # transformers before 5.23 has no such option
        options |= {"distributed_config": DistributedConfig(fsdp_size=shards, **replicas)}
    target, number_type = device(where), DTYPES.get(dtype, dtype)
    options |= quantized(quantization, dtype, target) | {"dtype": number_type, "output_loading_info": True}
    loader, attentions = auto_class(model_type), attentions_for(number_type, target)
    try:
        for attention in attentions:
            try:
                model, loaded = loader.from_pretrained(source, attn_implementation=attention, **options)
                break
            except ValueError as error:  # transformers names what the class lacks: Flash Attention 2, or ..._attention
                if attention == attentions[-1] or not re.search("does not support .*attention", str(error), re.I):
                    raise
        model = model if quantization or shards > 1 else model.to(target)
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"model {name} does not fit into the memory of {target}: use bf16 or choose a smaller model"
        ) from error
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise RunError(cannot_load(name, "weights", error)) from error
    model.drawn_at_random = sorted(loaded["missing_keys"])
    model.config._commit_hash = commit_of(name, revision)  # transformers before 5.23 sets it as well
    if pad_id is not None and MODEL_KINDS[model_type].has_head:
        padded_with(model, pad_id)
    return never_repacked(kept_sharded(model)).requires_grad_(False).eval()


def padded_with(model: nn.Module, pad_id: int) -> nn.Module:
    """Set the padding token in the model's configuration and return the model.

    The classification head of a causal model reads the last token before the padding.
    """
    model.config.get_text_config().pad_token_id = pad_id
    return model


def refuse_drawn_layers(model: nn.Module, name: str) -> None:
    """Raise RunError if the checkpoint lacks a frozen layer that is not part of the new head.

    Such a layer would get other random values at every loading, and a saved adapter fits only one of them.
    """
    drawn = [key for key in model.drawn_at_random if key.partition(".")[0] not in CLASSIFIER.head_modules]
    if drawn:
        raise RunError(
            f"the checkpoint of model {name} lacks {drawn[0]}"
            f"{f' and {len(drawn) - 1} other weights' if len(drawn) > 1 else ''}, which a classification model needs "
            "and an adapter does not save: choose a checkpoint that contains them, or peft=full_ft"
        )


def kept_sharded(model: nn.Module) -> nn.Module:
    """Return the model; a sharded one releases the gathered weights after every forward pass and is never saved whole.

    Otherwise the process that saves the adapters would have layers in another state than the other processes, PEFT
    would gather the whole base at every save, and the Trainer would refuse resume points, which here contain only the
    adapters. The device mesh loses the names of its dimensions, because PEFT 0.21 takes a sharded base that is also
    replicated for a tensor-parallel one, and would give its adapters the shape of one part of the weight.
    """
    if getattr(model, "is_distributed_loading_by_transformers", False):
        model.set_reshard_after_forward(True)
        model._is_distributed_loading_by_transformers, model._tp_size = False, None
        for weight in model.parameters():
            weight.device_mesh._mesh_dim_names = None
    return model


def never_repacked(model: nn.Module) -> nn.Module:
    """Prevent bitsandbytes from repacking the 4-bit layers, and return the model.

    On CPUs with AVX512-BF16 it would repack a layer in the first forward pass without gradients and round the scales
    to bf16. The outputs would then change between two passes, and no function dequantises the repacked layout.
    """
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return model


def quantized(kind: str | None, dtype: str, where: torch.device) -> dict[str, Any]:
    """Return the options that make transformers quantise a model while loading; ``dtype``: of matrix products."""
    if kind is None:
        return {}
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        settings = BitsAndBytesConfig(load_in_8bit=True)
    else:
        settings = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=DTYPES.get(dtype, torch.float32)
        )
    return {"quantization_config": settings, "device_map": {"": where}}


def load_skeleton(
    name: str, revision: str | None = None, model_type: str = CAUSAL.name, labels: Sequence[str] | None = None
) -> nn.Module:
    """Return the model without weights (meta device), built from config.json: names and shapes of its layers.

    labels: the words of a classification head; None: those of the configuration.
    Raises UsageError: transformers has no model of this type for the configuration.
    """
    config = load_config(name, revision)
    if labels is not None:
        config.num_labels = len(labels)
    try:
        with torch.device("meta"):
            return auto_class(model_type).from_config(config)
    except ValueError as error:
        fitting = kind_by_architecture((), config).name
        other = f"use model.type={fitting}" if model_type != fitting else "choose another model.name"
        raise UsageError(
            f"model.type={model_type} is not possible for {name}: transformers has no "
            f"{MODEL_KINDS[model_type].auto_class} for a {config.model_type} model; {other}"
        ) from error


def auto_class(model_type: str) -> Any:
    return getattr(importlib.import_module("transformers"), MODEL_KINDS[model_type].auto_class)


def cannot_load(name: str, what: str, error: Exception) -> str:
    reason = shorten(" ".join(str(error).split()), width=200, placeholder=" ...")
    here = "" if local_folder(name) else f" (there is no folder {name} in {Path.cwd()})"
    return (
        f"{what} of model {name} cannot be loaded ({reason}): pass a local folder{here}, or a hub id on a machine with "
        "a network (gated models also need a login)"
    )
