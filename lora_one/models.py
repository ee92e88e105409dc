"""Models and tokenizers, from the hub, a local folder or the bundled tiny one; and whether they fit this machine."""

import dataclasses
import importlib
import importlib.util
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lora_one.config import RunConfig, with_core
from lora_one.config.schemas import ModelConfig
from lora_one.errors import RunError, UsageError

BUNDLED = Path(__file__).parent / "assets"
CPU_LIMIT = 1.5e9  # parameters beyond which a training step takes minutes without an accelerator

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# model.type -> the class of transformers that loads it
AUTO_CLASSES = {
    "CausalLM": "AutoModelForCausalLM",
    "ConditionalGeneration": "AutoModelForSeq2SeqLM",
    "SequenceClassification": "AutoModelForSequenceClassification",
}

# where classification models of transformers keep what is new to them
HEADS = ("classifier", "score", "pre_classifier")

# of the hub ids in conf/model whose name does not say it
PARAMETERS = {"TinyLlama/TinyLlama_v1.1": 1.1e9}


def local_folder(name: str) -> Path | None:
    """The folder that a model name stands for on this machine, or None for a hub id.

    Raises UsageError: the name looks like a path and there is no such folder, or it holds no config.json; it is a file.
    """
    path = BUNDLED / name.removeprefix("bundled/") if name.startswith("bundled/") else Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise UsageError(
                f"model.name={name}: the folder {path} holds no config.json; give a Hugging Face model folder"
            )
        return path
    if path.is_file() or name.lower().endswith(".gguf"):
        raise UsageError(
            f"model.name={name}: a file, such as a GGUF, is not trained; give a Hugging Face model folder (a GGUF "
            "becomes one by from_pretrained(<folder>, gguf_file=<file>), then save_pretrained, of transformers)"
        )
    looks_local = name.startswith(("/", ".", "~", "bundled/")) or name.count("/") > 1
    if looks_local:
        known = ", ".join(f"bundled/{folder.name}" for folder in sorted(BUNDLED.iterdir()))
        raise UsageError(f"model.name={name}: no such folder; give a hub id, a folder, or {known}")
    return None


def check_weights(name: str) -> None:
    """Raises UsageError: the name is that of a local folder that holds no weights."""
    folder = local_folder(name)
    if folder and not any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir()):
        raise UsageError(
            f"model.name={name}: the folder {folder} holds a config.json and no weights (model.safetensors): fetch "
            "them, or give another model folder"
        )


def source_of(name: str, revision: str | None) -> tuple[str, dict[str, Any]]:
    folder = local_folder(name)
    return (str(folder.resolve()), {}) if folder else (name, {"revision": revision})


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


def preflight(model: ModelConfig, processes: int = 1, *, full: bool = False) -> None:
    """Refuse, before anything is downloaded or loaded, a model that this machine cannot train (full: every weight).

    Raises UsageError: no package for a quantised base, one process for a sharded one, a folder without weights, too
    many parameters without an accelerator, or weights beyond the free memory.
    """
    if model.sharded and processes == 1:
        raise UsageError("model.sharded=True shares the base out among processes: start several, or drop it")
    if model.quantization and importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(
            f"model.quantization={model.quantization} needs bitsandbytes, not installed here: "
            "pip install 'lora-one[quant]'"
        )
    check_weights(model.name)
    parameters = count_parameters(model.name)
    if parameters is None or not model.preflight:
        return
    where = device()
    size = f"model.name={model.name} has about {parameters / 1e9:.2g}B parameters"
    out = "take model=tiny, a smaller model.name, a machine with a GPU, or model.preflight=false to try all the same"
    if where.type == "cpu" and parameters > CPU_LIMIT:
        raise UsageError(f"{size}; without an accelerator at most {CPU_LIMIT / 1e9:g}B can be trained: {out}")
    held = parameters / processes if model.sharded else parameters
    # weights, and a fifth for adapters and activations; full: fp32 weights, their gradients and two moments
    needed = held * (16 if full else weight_bytes(model) * 1.2)
    free = free_bytes()
    if needed > free:
        raise UsageError(f"{size}: at least {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free on {where}; {out}")


def free_bytes() -> int:
    """Memory that is free on the device that models are loaded to."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available


def with_rank(run: RunConfig) -> RunConfig:
    """The run with the rank that ``peft.lora_relative_r`` gives: that share of the model's width, at least 1."""
    share = run.peft.lora_relative_r
    if share is None:
        return run
    width = load_config(run.model.name, run.model.revision).get_text_config().hidden_size
    peft = dataclasses.replace(run.peft, lora_r=max(1, int(share * width)))
    return with_core(dataclasses.replace(run, peft=peft))


def check_positions(model: nn.Module, settings: ModelConfig) -> None:
    """Raises UsageError: the model has learnt its positions, and fewer than ``model.max_length``."""
    places = learnt_positions(model)
    if places is not None and settings.max_length > places:
        raise UsageError(
            f"model.max_length={settings.max_length} exceeds the {places} positions that {settings.name} has learnt: "
            "lower it"
        )


def learnt_positions(model: nn.Module) -> int | None:
    """Positions with an embedding of their own, None where positions are computed."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in ("position_embeddings", "wpe"):
            before = 0 if module.padding_idx is None else module.padding_idx + 1  # RoBERTa counts from there
            return module.num_embeddings - before
    return None


def weight_bytes(model: ModelConfig) -> float:
    """Bytes a parameter of the base takes; quantised ones with their scales, embeddings and head left out."""
    return {"nf4": 0.57, "int8": 1.0}.get(model.quantization, 2 if model.bf16 else 4)


def count_parameters(name: str) -> float | None:
    """From the weight files of a local folder, a table, or the name ("...-7b-..."); None when nothing says."""
    folder = local_folder(name)
    if folder is not None:
        counted = sum(count_in_header(file) for file in folder.glob("*.safetensors"))
        return counted or None
    sizes = re.findall(r"(?<![\d.])(\d+(?:\.\d+)?)b(?![a-z])", name.lower())
    return PARAMETERS.get(name) or (float(sizes[0]) * 1e9 if sizes else None)


def count_in_header(file: Path) -> int:
    """Values in a safetensors file, from its header alone. Raises RunError: not a safetensors file."""
    try:
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    except (OSError, ValueError, OverflowError, MemoryError) as error:
        raise RunError(f"{file} is not a readable safetensors file: fetch it again") from error
    shapes = (entry["shape"] for name, entry in header.items() if name != "__metadata__")
    return sum(int(torch.Size(shape).numel()) for shape in shapes)


def load_tokenizer(name: str, revision: str | None = None, model_type: str = "CausalLM") -> Any:
    """Load the tokenizer of a model.

    Raises RunError: not found, or without an end-of-sequence token. For a classification head a separator is enough.
    """
    from transformers import AutoTokenizer

    source, options = source_of(name, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        raise RunError(cannot_load(name, "tokenizer", error)) from error
    separated = model_type == "SequenceClassification" and tokenizer.sep_token_id is not None
    if tokenizer.eos_token_id is None and not separated:
        raise RunError(
            f"the tokenizer of model {name} has no end-of-sequence token, which model.type={model_type} needs: set one "
            "in its folder, or take another model"
        )
    return tokenizer


def load_model(
    name: str,
    revision: str | None = None,
    *,
    dtype: str = "auto",
    where: str | None = None,
    quantization: str | None = None,
    model_type: str = "CausalLM",
    labels: Sequence[str] | None = None,
    shards: int = 1,
) -> nn.Module:
    """The frozen model on a device, in fp32, bf16, fp16 or ("auto") as it is stored.

    model_type: one of AUTO_CLASSES.  labels: the words of a classification head, one for each output; None: as the
    checkpoint says. A head that the checkpoint has not is drawn by torch's random numbers.
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
    return never_repacked(kept_sharded(model)).requires_grad_(False).eval()


def refuse_drawn_layers(model: nn.Module, name: str) -> None:
    """Raise RunError where a frozen layer outside the new head was not in the checkpoint.

    It would be drawn anew at every loading, and an adapter saved for one draw is wrong for another.
    """
    drawn = [key for key in model.drawn_at_random if key.partition(".")[0] not in HEADS]
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


def padded_with(model: nn.Module, pad_id: int) -> nn.Module:
    """Set the padding token of the batches in the model: a causal model's head reads the last token before it."""
    model.config.get_text_config().pad_token_id = pad_id
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


def original_weights(name: str, revision: str | None = None) -> Callable[[str], Tensor]:
    """Gives a layer's weight by the layer's name, fp32, as it stands in the model's safetensors files.

    Raises RunError: the files hold no such weight.
    """
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
            raise RunError(f"{folder} holds no {key} in its safetensors files: save the model with this transformers")
        with safe_open(files[key], "pt") as opened:
            return opened.get_tensor(key).float()

    return weight


def kind_of(model: nn.Module) -> str:
    """The ``model.type`` of a loaded model, inside an adapter too."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if type(inner).__name__.endswith("ForSequenceClassification"):
        return "SequenceClassification"
    return "ConditionalGeneration" if getattr(inner.config, "is_encoder_decoder", False) else "CausalLM"


def kind_of_checkpoint(name: str, revision: str | None = None) -> str:
    """The ``model.type`` of a saved model, by its configuration."""
    config = load_config(name, revision)
    if any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        return "SequenceClassification"
    return "ConditionalGeneration" if getattr(config, "is_encoder_decoder", False) else "CausalLM"


def auto_class(model_type: str) -> Any:
    return getattr(importlib.import_module("transformers"), AUTO_CLASSES[model_type])


def load_config(name: str, revision: str | None = None) -> Any:
    """The model's configuration, of transformers. Raises RunError: not found or broken."""
    from transformers import AutoConfig

    source, options = source_of(name, revision)
    try:
        return AutoConfig.from_pretrained(source, **options)
    except (OSError, ValueError) as error:
        raise RunError(cannot_load(name, "configuration", error)) from error


def load_skeleton(
    name: str, revision: str | None = None, model_type: str = "CausalLM", labels: Sequence[str] | None = None
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
        fitting = "ConditionalGeneration" if getattr(config, "is_encoder_decoder", False) else "CausalLM"
        other = f"take model.type={fitting}" if model_type != fitting else "take another model.name"
        raise UsageError(
            f"model.type={model_type} does not fit {name}, a {config.model_type}, for which transformers has no "
            f"{AUTO_CLASSES[model_type]}: {other}"
        ) from error


def cannot_load(name: str, what: str, error: Exception) -> str:
    reason = shorten(" ".join(str(error).split()), width=200, placeholder=" ...")
    return (
        f"{what} of model {name} cannot be loaded ({reason}): give a local folder, or a hub id where there is a "
        "network (and, for gated models, a login)"
    )


def weight_shape(layer: nn.Module) -> tuple[int, int]:
    """(m, n), whatever the orientation the weight is stored in: transformers' Conv1D keeps W^T."""
    return (layer.nf, layer.nx) if hasattr(layer, "nf") else (layer.out_features, layer.in_features)
