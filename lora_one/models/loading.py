"""Load tokenizers, configurations and models, quantised or in parts where asked."""

import importlib
import importlib.util
from collections.abc import Sequence
from textwrap import shorten
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from lora_one.errors import RunError, UsageError
from lora_one.model_kinds import CAUSAL, CLASSIFIER, MODEL_KINDS, kind_by_architecture
from lora_one.models.location import check_weights, source_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def device(wanted: str | None = None) -> torch.device:
    """The accelerator if there is one. Raises UsageError: the wanted device is not there."""
    if wanted is not None:
        try:
            return torch.empty(0, device=wanted).device
        except (RuntimeError, AssertionError) as error:
            raise UsageError(f"device {wanted} is not available here: cpu always is") from error
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps") if torch.backends.mps.is_available() else torch.device("cpu")


def attention_of(dtype: torch.dtype | str, where: torch.device) -> str:
    """flash_attention_2 where its package, a CUDA device and a 16-bit dtype are there, else torch's own."""
    flash = importlib.util.find_spec("flash_attn") and where.type == "cuda"
    return "flash_attention_2" if flash and dtype in (torch.bfloat16, torch.float16) else "sdpa"


def load_tokenizer(name: str, revision: str | None = None, model_type: str = CAUSAL.name) -> Any:
    """Load the tokenizer of a model.

    Raises RunError: not found, or without an end-of-sequence token. For a classification head a separator is enough.
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
            f"the tokenizer of model {name} has no end-of-sequence token, which model.type={model_type} needs: set one "
            "in its folder, or take another model"
        )
    return tokenizer


def load_config(name: str, revision: str | None = None) -> Any:
    """The model's configuration, of transformers. Raises RunError: not found or broken."""
    from transformers import AutoConfig

    source, options = source_of(name, revision)
    try:
        return AutoConfig.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        raise RunError(cannot_load(name, "configuration", error)) from error


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
) -> nn.Module:
    """Load a frozen model onto a device, in fp32, bf16, fp16 or ("auto") as it is stored.

    model_type: a name in MODEL_KINDS.  labels: the words of a classification head, one for each output; None: as the
    checkpoint says. A head that the checkpoint lacks is drawn by torch's random numbers.
    pad_id: the padding token of the batches, which a classification head is told.
    quantization: "nf4" (bitsandbytes' 4 bit, blocks of 64) or "int8" of the linear layers but the head.
    shards: processes that hold a part of the weights each (FSDP), all there are; each reads its own only.
    Raises UsageError: a folder without weights.  RunError: not found, broken, or too large for the device.
    """
    from transformers.distributed import DistributedConfig

    check_weights(name)
    source, options = source_of(name, revision)
    if labels is not None:
        words = dict(enumerate(labels))
        options |= {"id2label": words, "label2id": {word: place for place, word in words.items()}}
    options |= {"distributed_config": DistributedConfig(fsdp_size=shards)} if shards > 1 else {}
    target, number_type = device(where), DTYPES.get(dtype, dtype)
    options |= quantized(quantization, dtype, target) | {"dtype": number_type, "output_loading_info": True}
    kind, attention = auto_class(model_type), attention_of(number_type, target)
    try:
        try:
            model, loaded = kind.from_pretrained(source, attn_implementation=attention, **options)
        except ValueError as error:
            if "scaled_dot_product_attention" not in str(error):
                raise
            model, loaded = kind.from_pretrained(source, attn_implementation="eager", **options)
        model = model if quantization or shards > 1 else model.to(target)
    except torch.OutOfMemoryError as error:
        raise RunError(f"model {name} does not fit on {target}: take bf16 or a smaller model") from error
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise RunError(cannot_load(name, "weights", error)) from error
    model.drawn_at_random = sorted(loaded["missing_keys"])
    if pad_id is not None and MODEL_KINDS[model_type].has_head:
        padded_with(model, pad_id)
    return never_repacked(kept_sharded(model)).requires_grad_(False).eval()


def padded_with(model: nn.Module, pad_id: int) -> nn.Module:
    """Set the padding token of the batches in the model: a causal model's head reads the last token before it."""
    model.config.get_text_config().pad_token_id = pad_id
    return model


def refuse_drawn_layers(model: nn.Module, name: str) -> None:
    """Raise RunError where a frozen layer outside the new head was not in the checkpoint.

    It would be drawn anew at every loading, and an adapter saved for one draw is wrong for another.
    """
    drawn = [key for key in model.drawn_at_random if key.partition(".")[0] not in CLASSIFIER.head_modules]
    if drawn:
        raise RunError(
            f"model {name} lacks {drawn[0]}{f' and {len(drawn) - 1} more' if len(drawn) > 1 else ''}, which a "
            "classification model needs and an adapter does not save: take a checkpoint that has it, or peft=full_ft"
        )


def kept_sharded(model: nn.Module) -> nn.Module:
    """The model; a sharded one is in parts whenever it does not compute, and nobody thinks that it is saved.

    Otherwise the first process, saving the adapters alone, would leave the others with layers in another state, PEFT
    would gather the base at every save, and the Trainer refuse resume points, of which ours hold the adapters only.
    """
    if getattr(model, "is_distributed_loading_by_transformers", False):
        model.set_reshard_after_forward(True)
        model._is_distributed_loading_by_transformers, model._tp_size = False, None
    return model


def never_repacked(model: nn.Module) -> nn.Module:
    """The model, whose 4-bit layers keep their layout on CPUs with AVX512-BF16.

    There bitsandbytes repacks a layer in its first forward pass without gradients and rounds its scales to bf16: the
    function changes between two passes, and the layout is one that nothing dequantises.
    """
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return model


def quantized(kind: str | None, dtype: str, where: torch.device) -> dict[str, Any]:
    """What makes transformers quantise a model as it loads it; products are taken in ``dtype``."""
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
    """The model's layers without weights (meta device): names and shapes, from config.json alone.

    labels: the words of a classification head; None: as the configuration says.
    Raises UsageError: transformers has no model of that type for this configuration.
    """
    config = load_config(name, revision)
    if labels is not None:
        config.num_labels = len(labels)
    try:
        with torch.device("meta"):
            return auto_class(model_type).from_config(config)
    except ValueError as error:
        fitting = kind_by_architecture((), encoder_decoder=getattr(config, "is_encoder_decoder", False)).name
        other = f"take model.type={fitting}" if model_type != fitting else "take another model.name"
        raise UsageError(
            f"model.type={model_type} does not fit {name}, a {config.model_type}, for which transformers has no "
            f"{MODEL_KINDS[model_type].auto_class}: {other}"
        ) from error


def auto_class(model_type: str) -> Any:
    return getattr(importlib.import_module("transformers"), MODEL_KINDS[model_type].auto_class)


def cannot_load(name: str, what: str, error: Exception) -> str:
    reason = shorten(" ".join(str(error).split()), width=200, placeholder=" ...")
    return (
        f"{what} of model {name} cannot be loaded ({reason}): give a local folder, or a hub id where there is a "
        "network (and, for gated models, a login)"
    )
