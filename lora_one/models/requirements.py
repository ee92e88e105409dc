"""What a model requires of this machine, checked before anything is downloaded or loaded."""

import importlib.util
import json
import re
from pathlib import Path

import psutil
import torch

from lora_one.config.schemas import ModelConfig
from lora_one.errors import RunError, UsageError
from lora_one.models.loading import device
from lora_one.models.location import check_weights, local_folder

CPU_LIMIT = 1.5e9  # parameters beyond which a training step takes minutes without an accelerator

# of the hub ids in conf/model whose name does not say it
PARAMETERS = {"TinyLlama/TinyLlama_v1.1": 1.1e9}


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
