"""Check that this machine can train a model, before anything is downloaded or loaded."""

import dataclasses
import importlib.util
import json
import re
from math import prod
from pathlib import Path

from lora_one.config.schemas import NODE, ModelConfig
from lora_one.errors import RunError, UsageError
from lora_one.models.loading import device
from lora_one.models.location import check_weights, local_folder
from lora_one.models.peak_memory import free_bytes, free_memory

CPU_LIMIT = 1.5e9  # parameters beyond which a training step takes minutes without an accelerator

# Parameters of the hub ids in conf/model whose name does not contain the number
PARAMETERS = {"TinyLlama/TinyLlama_v1.1": 1.1e9}


def preflight(
    model: ModelConfig, processes: int = 1, *, full: bool = False, full_size_moments: str | list[str] | None = None
) -> None:
    """Refuse a model that this machine cannot train; nothing is downloaded or loaded.

    full: all weights are trained.  full_size_moments: ``peft.lora_target_modules``, if the optimizer keeps two fp32
    moments of the size of each adapted weight.
    Raises UsageError: bitsandbytes is missing for a quantised base, a folder has no weights, there are too many
    parameters for a CPU, or the weights need more than the free memory.
    """
    if model.quantization and importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(
            f"model.quantization={model.quantization} needs bitsandbytes, which is not installed: "
            "pip install 'lora-one[quant]'"
        )
    check_weights(model.name)
    parameters = count_parameters(model.name)
    if parameters is None or not model.preflight:
        return
    where = device()
    size = f"model.name={model.name} has about {parameters / 1e9:.2g}B parameters"
    out = (
        "choose a smaller model (model=tiny), a machine with a GPU (to plan for one here: dry_run=true "
        "plan.processes=1), or model.preflight=false to skip this check"
    )
    if where.type == "cpu" and parameters > CPU_LIMIT:
        raise UsageError(f"{size}; the limit without an accelerator is {CPU_LIMIT / 1e9:g}B: {out}")
    on_device = parameters / model.shards(processes)
    # The weights, and a fifth of that for adapters and activations; full: fp32 weights, gradients and two moments
    needed = on_device * (16 if full else weight_bytes(model) * 1.2)
    moments = 0 if full_size_moments is None else 8 * adapted_parameters(model.name, full_size_moments)
    free = free_bytes()
    if needed + moments > free:
        free_memory()  # the model of an earlier job of this process
        free = free_bytes()
    if needed + moments > free:
        with_moments = f", of which {moments / 1e9:.1f} GB are moments of the size of the adapted weights"
        out = f"choose an optimizer without them (optimizer=adamw), {out}" if moments > 0.2 * needed else out
        raise UsageError(
            f"{size} and needs at least {(needed + moments) / 1e9:.1f} GB{with_moments if moments else ''}, but only "
            f"{free / 1e9:.1f} GB are free on {where}: {out}"
        )


def with_shards(model: ModelConfig, processes: int, per_node: int | None) -> ModelConfig:
    """Return the settings with the number of processes that share one copy of the base in place of ``sharded=node``.

    per_node: processes of each node; None: not known.
    Raises UsageError: there is nothing to share, the copies do not divide the processes, the number of processes of a
    node is needed but not known, or transformers cannot replicate a sharded model.
    """
    sharded = model.sharded
    if not sharded:
        return model
    if processes == 1:
        raise UsageError(
            f"model.sharded={sharded} distributes the base over several processes, but there is only one: start "
            "several (torchrun, accelerate launch or srun), plan for several (dry_run=true plan.processes=8), or set "
            "model.sharded=false"
        )
    if sharded == NODE and per_node is None:
        raise UsageError(
            "model.sharded=node needs the same number of processes on each node, but it differs or is not known: set "
            "model.sharded=<number of processes that share one copy of the base>; in a dry run, "
            "plan.hardware tells it too (devices_per_node), in a run the launcher (LOCAL_WORLD_SIZE)"
        )
    size = min(per_node, processes) if sharded == NODE else sharded
    shards = dataclasses.replace(model, sharded=size).shards(processes)
    if shards == 1:
        raise UsageError(
            "model.sharded=node divides nothing, because each node has one process (LOCAL_WORLD_SIZE=1): set "
            "model.sharded=true, or the number of processes that share one copy of the base"
        )
    if processes % shards:
        of_node = f" ({shards} processes)" if sharded == NODE else ""
        raise UsageError(
            f"model.sharded={sharded}{of_node} does not divide the {processes} processes into equal groups: set it to "
            f"a divisor of {processes}, or start a multiple of {shards} processes"
        )
    if shards < processes:
        from transformers.distributed import DistributedConfig

        if not hasattr(DistributedConfig, "dp_replicate_size"):
            raise UsageError(
                f"model.sharded={sharded} needs transformers 5.23 or newer: pip install -U transformers, or set "
                "model.sharded=true"
            )
    return dataclasses.replace(model, sharded=size)


def weight_bytes(model: ModelConfig) -> float:
    """Return the bytes per parameter of the base; if quantised, with scales, without embeddings and head."""
    return {"nf4": 0.57, "int8": 1.0}.get(model.quantization, 2 if model.bf16 else 4)


def count_parameters(name: str) -> float | None:
    """Return the number of parameters, from the weight files of a local folder, a table, or the name ("...-7b-...").

    None: none of these gives it.
    """
    folder = local_folder(name)
    if folder is not None:
        counted = sum(count_in_header(file) for file in folder.glob("*.safetensors"))
        return counted or None
    sizes = re.findall(r"(?<![\d.])(\d+(?:\.\d+)?)b(?![a-z])", name.lower())
    return PARAMETERS.get(name) or (float(sizes[0]) * 1e9 if sizes else None)


def adapted_parameters(name: str, targets: str | list[str]) -> float:
    """Return a lower bound of the number of weights in the adapted layers; targets: ``peft.lora_target_modules``.

    Of a local folder they are counted in the headers of its files: matrices that are neither embeddings nor as high as
    the vocabulary. Of a model known by its number of parameters alone, all linear layers have at least half of them.
    """
    folder = local_folder(name)
    if folder is None:
        return (count_parameters(name) or 0) / 2 if targets == "all" else 0
    shapes = {name: shape for file in folder.glob("*.safetensors") for name, shape in shapes_in_header(file).items()}
    vocabulary = json.loads((folder / "config.json").read_text()).get("vocab_size")
    layers = {
        name.removesuffix(".weight"): shape
        for name, shape in shapes.items()
        if len(shape) == 2 and shape[0] != vocabulary and "embed" not in name
    }
    if targets != "all":
        endings = tuple(f".{target}" for target in targets)
        layers = {name: shape for name, shape in layers.items() if f".{name}".endswith(endings)}
    return sum(m * n for m, n in layers.values())


def count_in_header(file: Path) -> int:
    """Return the number of values in a safetensors file, from its header. Raises RunError: not a safetensors file."""
    return sum(map(prod, shapes_in_header(file).values()))


def shapes_in_header(file: Path) -> dict[str, list[int]]:
    """Return name -> shape of the tensors in a safetensors file. Raises RunError: not a safetensors file."""
    try:
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    except (OSError, ValueError, OverflowError, MemoryError) as error:
        raise RunError(f"{file} is not a valid safetensors file: download it again") from error
    return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
