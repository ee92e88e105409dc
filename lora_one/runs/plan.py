"""The plan of a run, printed by dry_run=true: for this machine, or for the one that the keys of ``plan`` describe."""

from torch import nn

from lora_one.adaptation.layers import scaling_of
from lora_one.adaptation.selection import adaptation_of
from lora_one.config import RunConfig
from lora_one.config.hardware import Hardware
from lora_one.config.schemas import NODE
from lora_one.data import load_dataset
from lora_one.data.encoders import encoder_for
from lora_one.datasets import DATASETS, labels_of
from lora_one.distributed import Processes
from lora_one.evaluation.validation import Validation
from lora_one.initialization.curvature import LIMIT
from lora_one.initialization.gradients import sum_dtype
from lora_one.initialization.holding import room_beside
from lora_one.initialization.moments import group_bytes, groups_of_passes
from lora_one.initialization.probe import refuse_too_few
from lora_one.models import (
    DTYPES,
    check_positions,
    device,
    free_bytes,
    load_skeleton,
    weight_bytes,
    weight_shape,
)
from lora_one.records.folder import RunFolder, method_name
from lora_one.runs.memory_forecast import activation_bytes, groups_of_inputs, state_bytes
from lora_one.runs.scale_plan import planned_bases, scale_plan
from lora_one.training.schedule import refuse_idle, refuse_no_learning, total_steps

GB = 1e9


def plan(run: RunConfig, folder: RunFolder, hardware: Hardware | None = None) -> str:
    """Return model, data, method, steps, memory and output folder as text, without loading weights.

    The number of examples is exact for local data; for data of the hub it is the configured maximum.
    hardware: the profile that ``plan.hardware`` names.
    Raises UsageError: the learning rate would always be 0, or there are more processes than examples.
    """
    elsewhere, processes = run.plan.given, planned_processes(run)
    model, dataset, adaptation = run.model, run.dataset, adaptation_of(run, folder.initial_factors)
    skeleton = load_skeleton(model.name, model.revision, model.type, labels_of(dataset.name))
    layers = adaptation.layers(skeleton, run.init)
    check_positions(skeleton, model)
    parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    trainable = adaptation.trainable_parameters(skeleton)
    examples, data = _examples(run)
    refuse_idle(examples, processes)
    refuse_no_learning(examples, model)
    where = f"{processes} x {run.plan.hardware or 'unknown hardware'}" if elsewhere else device()
    kind = model.quantization or ("bf16" if model.bf16 else "fp32")
    lines = {
        "model": f"{model.name}, {parameters:,} parameters, {kind}, on {where}",
        "data": f"{dataset.name}{f' from {dataset.path}' if dataset.path else ''}, {data}",
        "method": f"{method_name(run)}, scaling {scaling_of(run.peft):.4g}" if layers else method_name(run),
        "adapter": f"{len(layers)} layers, {trainable:,} trainable parameters"
        + (" at most; the initialisation distributes them over the layers by rank" if run.init.sets_ranks else ""),
        "gradient": _gradient(run) if layers or run.init.steps_weights else "none",
        **_curvature(run, layers),
        "steps": f"{total_steps(examples, model)} of {model.real_batch_size} examples, "
        f"{model.epochs:g} {'epoch' if model.epochs == 1 else 'epochs'}",
        **({} if elsewhere else _memory(run, skeleton, layers, parameters, trainable)),
        "output": str(folder.path),
    }
    text = "\n".join(f"{name:9s} {text}" for name, text in lines.items())
    if not elsewhere:
        return text
    bases = planned_bases(run, skeleton, layers, trainable, examples, hardware)
    return f"{text}\n\n{scale_plan(bases, processes)}"


def planned_processes(run: RunConfig) -> int:
    """Return the number of processes that a dry run plans for; by default those of the launcher."""
    return run.plan.processes or Processes.current().count


def planned_per_node(run: RunConfig, hardware: Hardware | None) -> int | None:
    """Return the number of processes of each node; None: it is not known, or ``model.sharded`` does not need it."""
    if run.model.sharded != NODE:
        return None
    if run.plan.given:
        return None if hardware is None else hardware.devices_per_node
    return Processes.current().per_node()


def _memory(
    run: RunConfig, skeleton: nn.Module, layers: dict[str, nn.Module], parameters: int, trainable: int
) -> dict[str, str]:
    """Forecast the memory of the initialisation and of training, and the largest micro-batch that fits."""
    model, full = run.model, not layers
    dtype = DTYPES["bf16" if model.bf16 and not full else "fp32"]
    outputs = 0 if model.kind.has_head else skeleton.config.get_text_config().vocab_size

    def example_bytes(length: int) -> int:
        kept = activation_bytes(
            skeleton.config, model.type, None if full else layers, 1, length, dtype,
            checkpointing=model.gradient_checkpointing,
        )  # fmt: skip
        return kept + length * outputs * (8 + 2 * dtype.itemsize)  # logits, their fp32 copy and gradients

    weights = parameters * (4 if full else weight_bytes(model)) / model.shards(planned_processes(run))
    states = state_bytes(run.optimizer, trainable, [weight_shape(layer) for layer in layers.values()])
    each = example_bytes(model.max_length)
    training = weights + states + model.per_device_batch_size * each
    parts = f"weights {weights / GB:.2f}, optimizer {states / GB:.3f}, each example of {model.max_length} tokens"
    lines = {"memory": f"training about {training / GB:.2f} GB: {parts} {each / GB:.3f}"}
    if run.init.needs_examples and not full:
        rows = run.init.bsz or model.per_device_batch_size
        taken = weights + rows * (each if run.init.max_length is None else example_bytes(run.init.max_length))
        held, in_passes = _held(run, skeleton, layers, taken)
        start = taken + held
        lines["memory"] += f"; init at most {start / GB:.2f} GB, including gradients {held / GB:.2f}{in_passes}"
    free = free_bytes()
    fitting = int((free - weights - states) / each)
    largest = f"{fitting} examples" if fitting > 0 else "no example"
    lines["fits"] = f"{largest} of {model.max_length} tokens per micro-batch in {free / GB:.1f} GB of free memory"
    return lines


def _held(run: RunConfig, skeleton: nn.Module, layers: dict[str, nn.Module], taken: float) -> tuple[int, str]:
    """Return the bytes of all gradients of the initialisation; with second moments, those of a pass, and the passes.

    taken: bytes of weights and activations.
    """
    if not run.init.needs_moments:
        gradients = run.init.needs_gradient or run.init.gradient_by_peft
        return sum(m * n for m, n in map(weight_shape, layers.values())) * 4 * gradients, ""
    groups = groups_of_inputs(skeleton.config, run.model.type, layers)
    sizes = [group_bytes([layers[name] for name in group], sum_dtype(skeleton, layers)) for group in groups]
    parts = groups_of_passes(sizes, run.init.memory, lambda: room_beside(sum(sizes), free_bytes(), lambda: taken))
    largest = max(sum(sizes[index] for index in part) for part in parts)
    return largest, f" and second moments, in {len(parts)} {'pass' if len(parts) == 1 else 'passes'} over the examples"


def _curvature(run: RunConfig, layers: dict[str, nn.Module]) -> dict[str, str]:
    """Return in words which eigenvalues are computed before training, and from how many passes; {}: none."""
    count = run.wandb.curvature_examples
    if not count:
        return {}
    wanted = "largest eigenvalue of the Hessian in the adapters"
    matrices = "at most"
    if run.wandb.curvature_by_layer:
        wanted += f", and in those of each of the {len(layers)} layers alone"
        matrices = "for each at most"
    return {
        "curvature": f"{wanted}, on {count} training examples: {matrices} {LIMIT} products, each with two "
        "backward passes over them"
    }


def _examples(run: RunConfig) -> tuple[int, str]:
    """Return the number of training examples, and the data in words."""
    dataset = run.dataset
    sizes = (dataset.max_train_samples, dataset.train_size, getattr(dataset, "rows", None))
    limits = [size for size in sizes if size is not None]
    if limits and dataset.path is None and not DATASETS[dataset.name].generated:
        refuse_too_few(run, min(limits))
        return min(limits), f"from the hub, at most {min(limits):,} training examples"
    encoder = encoder_for(run.model, dataset)
    splits = load_dataset(dataset, encoder, run.model.max_length)
    Validation(run, splits, encoder)  # refuses an accuracy that cannot be measured
    refuse_too_few(run, len(splits.train))
    return len(splits.train), f"{len(splits.train):,} training and {len(splits.validation):,} validation examples"


def _gradient(run: RunConfig) -> str:
    """Return in words what the initialisation computes from the examples."""
    if not run.init.needs_examples:
        return "none"
    wanted = run.init.examples_wanted
    examples = f"{'all training' if wanted is None else wanted} examples"
    if run.init.needs_gradient:
        return f"over {examples}, mean over each {run.init.reduction}"
    return f"by PEFT, over {examples}" if run.init.gradient_by_peft else f"none; activations on {examples}"
