"""What a run would do, before it does it."""

from pathlib import Path

from lora_one.adapters import scaling_of, target_layers
from lora_one.config import RunConfig
from lora_one.config.schemas import ArithmeticConfig, GradientInit, PeftLoraGAInit, ProbedInit
from lora_one.data import load_dataset
from lora_one.data.encode import encoder_for
from lora_one.data.probe import examples_wanted
from lora_one.gradients import weight_shape
from lora_one.inits import build_init
from lora_one.models import device, load_skeleton, weight_bytes
from lora_one.run_folder import method_name
from lora_one.training import total_steps

GB = 1e9


def plan(run: RunConfig, folder: Path) -> str:
    """Model, data, method, steps, memory and output folder, as text; no weights are loaded.

    Data on this machine are read, so their numbers are exact; of the hub's only the published sizes are used.
    """
    model, dataset = run.model, run.dataset
    skeleton = load_skeleton(model.name, model.revision, model.type)
    layers = target_layers(skeleton, run.peft, build_init(run.init))
    parameters = sum(parameter.numel() for parameter in skeleton.parameters())
    shapes = [weight_shape(layer) for layer in layers.values()]
    rank = run.peft.lora_r
    trainable = sum(rank * rank if run.peft.lora_xs else rank * (m + n) + m * run.peft.dora for m, n in shapes)
    examples, data = _examples(run)
    gradients = sum(m * n for m, n in shapes) * 4 if isinstance(run.init, GradientInit | PeftLoraGAInit) else 0
    weights = parameters * weight_bytes(model)
    states = trainable * 16  # fp32: value, gradient, two moments
    logits = model.per_device_batch_size * model.max_length * skeleton.config.get_text_config().vocab_size * 8
    kind = model.quantization or ("bf16" if model.bf16 else "fp32")
    lines = {
        "model": f"{model.name}, {parameters:,} parameters, {kind}, on {device()}",
        "data": f"{dataset.name}{f' from {dataset.path}' if dataset.path else ''}, {data}",
        "method": f"{method_name(run)}, scaling {scaling_of(run.peft):.4g}",
        "adapter": f"{len(layers)} layers, {trainable:,} trainable parameters",
        "gradient": _gradient(run),
        "steps": f"{total_steps(examples, model)} of {model.real_batch_size} examples, {model.epochs:g} epochs",
        "memory": f"at least {(weights + max(states + logits, gradients)) / GB:.2f} GB: weights {weights / GB:.2f}, "
        f"adapter and optimizer {states / GB:.3f}, logits {logits / GB:.2f}, init gradients {gradients / GB:.2f}",
        "output": str(folder),
    }
    return "\n".join(f"{name:9s} {text}" for name, text in lines.items())


def _examples(run: RunConfig) -> tuple[int, str]:
    dataset = run.dataset
    limits = [size for size in (dataset.max_train_samples, dataset.train_size) if size is not None]
    if limits and dataset.path is None and not isinstance(dataset, ArithmeticConfig):
        return min(limits), f"from the hub, at most {min(limits):,} training examples"
    splits = load_dataset(dataset, encoder_for(run.model, dataset), run.model.max_length)
    return len(splits.train), f"{len(splits.train):,} training and {len(splits.validation):,} validation examples"


def _gradient(run: RunConfig) -> str:
    if not isinstance(run.init, ProbedInit):
        return "none"
    wanted = examples_wanted(run.init)
    examples = f"{'all training' if wanted is None else wanted} examples"
    if isinstance(run.init, GradientInit):
        return f"over {examples}, mean over each {run.init.reduction}"
    return f"by PEFT, over {examples}" if isinstance(run.init, PeftLoraGAInit) else f"none; activations of {examples}"
