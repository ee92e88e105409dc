"""What the values of a configuration must be: each by itself, and together."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_one.config.methods import methods_with
from lora_one.config.methods.base import Choices, Ranges
from lora_one.datasets import CLASSIFIED, DATASETS
from lora_one.datasets.questions import EVALUATIONS, evaluations_in
from lora_one.errors import UsageError, nearest
from lora_one.model_kinds import CAUSAL, MODEL_KINDS

if TYPE_CHECKING:
    from lora_one.config import RunConfig

CHOICES: Choices = {
    "model.type": tuple(MODEL_KINDS),
    "model.quantization": ("nf4", "int8"),
    "model.scheduler": ("linear", "cosine", "constant"),
    "model.loss": ("token", "example"),
    "optimizer.damping": ("absolute", "relative"),
    "optimizer.order": ("simultaneous", "sequential"),
    "wandb.mode": ("online", "offline", "disabled"),
}

# key -> (the rule in words, the rule); null is always allowed. Those of init are with the methods' settings.
RANGES: Ranges = {
    "seed": ("an integer in [0, 2^32)", lambda v: 0 <= v < 2**32),
    "model.seed": ("an integer in [0, 2^32)", lambda v: 0 <= v < 2**32),
    "model.order_seed": ("an integer in [0, 2^32)", lambda v: 0 <= v < 2**32),
    "dataset.data_seed": ("an integer in [0, 2^32)", lambda v: 0 <= v < 2**32),
    "dataset.shuffle_seed": ("an integer in [0, 2^32)", lambda v: 0 <= v < 2**32),
    "peft.lora_r": ("at least 1", lambda v: v >= 1),
    "peft.lora_relative_r": ("in (0, 1]", lambda v: 0 < v <= 1),
    "peft.lora_alpha": ("positive", lambda v: v > 0 and math.isfinite(v)),
    "peft.lora_dropout": ("in [0, 1)", lambda v: 0 <= v < 1),
    "peft.loraplus_lr_ratio": ("positive", lambda v: v > 0 and math.isfinite(v)),
    "model.epochs": ("0 (initialise only) or more", lambda v: v >= 0 and math.isfinite(v)),
    "model.eval_epochs": ("positive", lambda v: v > 0 and math.isfinite(v)),
    "model.early_stopping_patience": ("0 (off) or more", lambda v: v >= 0),
    "model.per_device_batch_size": ("at least 1", lambda v: v >= 1),
    "model.real_batch_size": ("at least 1", lambda v: v >= 1),
    "model.max_length": ("at least 2 tokens", lambda v: v >= 2),
    "model.logging_steps": ("at least 1", lambda v: v >= 1),
    "model.learning_rate": ("positive", lambda v: v > 0 and math.isfinite(v)),
    "model.weight_decay": ("not negative", lambda v: v >= 0 and math.isfinite(v)),
    "model.prec_reg": ("not negative", lambda v: v >= 0 and math.isfinite(v)),
    "model.warmup": ("a fraction below 1 or a number of steps", lambda v: 0 <= v < 1 or (v >= 1 and v.is_integer())),
    "model.max_grad_norm": ("not negative (0 = no clipping)", lambda v: v >= 0),
    "model.save_steps": ("at least 1", lambda v: v >= 1),
    "optimizer.betas": ("two numbers in [0, 1)", lambda v: len(v) == 2 and all(0 <= beta < 1 for beta in v)),
    "optimizer.eps": ("positive", lambda v: v > 0 and math.isfinite(v)),
    "optimizer.momentum": ("in [0, 1)", lambda v: 0 <= v < 1),
    "dataset.max_train_samples": ("at least 1", lambda v: v >= 1),
    "dataset.max_eval_samples": ("at least 1", lambda v: v >= 1),
    "dataset.train_size": ("at least 1", lambda v: v >= 1),
    "dataset.validation_size": ("a share below 1 or a number of examples", lambda v: 0 < v < 1 or v == int(v) >= 1),
    "dataset.rows": ("at least 1", lambda v: v >= 1),
    "dataset.max_tokens": ("at least 2", lambda v: v >= 2),
    "dataset.accuracy_examples": ("0 (none) or more", lambda v: v >= 0),
    "dataset.max_new_tokens": ("at least 1", lambda v: v >= 1),
    "wandb.diagnostics_every": ("0 (never) or a number of steps", lambda v: v >= 0),
}


def flatten(run: "RunConfig") -> dict[str, Any]:
    """Dotted key -> value, one level of sections."""
    flat: dict[str, Any] = {}
    for key, value in run.to_dict().items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": item for inner, item in value.items()}
        else:
            flat[key] = value
    return flat


def check(run: "RunConfig") -> None:
    """Values against their ranges and against each other; the first violation is raised."""
    choices, ranges = run.init.value_rules()
    check_values(flatten(run), CHOICES | choices, RANGES | ranges)
    for together in (check_batches, check_peft, check_core, check_kind, check_quantization, check_dataset, check_names):
        together(run)
    check_sharded(run)
    run.init.check()


def check_values(flat: dict[str, Any], choices: Choices, ranges: Ranges) -> None:
    """Check each value by itself. Raises UsageError: not one of its choices, or out of its range."""
    for key, valid in choices.items():
        if flat.get(key) is not None and flat[key] not in valid:
            raise UsageError(f"{key}={flat[key]} is not a choice; {nearest(flat[key], valid)}")
    for key, (rule, holds) in ranges.items():
        value = flat.get(key)
        if value is not None and not holds(value):
            raise UsageError(f"{key}={value} is out of range: it must be {rule}")


def check_batches(run: "RunConfig") -> None:
    real, device = run.model.real_batch_size, run.model.per_device_batch_size
    if real % device:
        raise UsageError(
            f"model.real_batch_size={real} is not divisible by model.per_device_batch_size={device}; "
            f"take a multiple of {device} such as {max(device, real - real % device)}, or a smaller "
            "model.per_device_batch_size"
        )
    if run.model.packing and run.model.kind is not CAUSAL:
        raise UsageError(
            f"model.packing={run.model.packing} puts the examples of causal models in one row, not those of "
            f"model.type={run.model.type}: drop it"
        )


def check_peft(run: "RunConfig") -> None:
    targets = run.peft.lora_target_modules
    is_list = isinstance(targets, list) and targets and all(isinstance(name, str) for name in targets)
    if targets != "all" and not is_list:
        raise UsageError(
            f"peft.lora_target_modules={targets!r} must be the word all or a list of layer names such as "
            "[q_proj,v_proj]"
        )
    if run.peft.adalora:
        check_adalora(run)
    if run.peft.train_embeddings and run.model.kind.has_decoder:
        raise UsageError(
            "peft.train_embeddings=true: the embeddings of an encoder-decoder are one weight in several places, which "
            "PEFT does not keep tied; take peft=all, or peft=full_ft"
        )
    if not run.peft.use_peft:
        check_full(run)


def check_adalora(run: "RunConfig") -> None:
    """AdaLoRA has a start, an architecture and a scaling of its own."""
    init, peft = run.init, run.peft
    if not init.plain:
        raise UsageError(f"peft.adalora=True has a start of its own, not {init.title}'s: drop init=, or take peft=all")
    asked = {
        "peft.dora": peft.dora,
        "peft.lora_xs": peft.lora_xs,
        "peft.use_loraplus": peft.use_loraplus,
        "optimizer": run.optimizer.preconditioned,
        "wandb.diagnostics_every": run.wandb.diagnostics_every > 0,
    }
    for key, unfit in asked.items():
        if unfit:
            value = run.optimizer.name if key == "optimizer" else flatten(run)[key]
            raise UsageError(f"{key}={value} is for LoRA's two factors, and AdaLoRA has three: drop one of them")


def check_full(run: "RunConfig") -> None:
    """Every weight trains: there is no adapter to start, to precondition or to quantise beneath."""
    init, peft = run.init, run.peft
    if not (init.plain and init.zero_start):
        raise UsageError(
            f"peft.use_peft={peft.use_peft} trains every weight, and {init.title} starts adapters: drop init=, or take "
            "peft=all"
        )
    asked = {
        "peft.dora": peft.dora,
        "peft.lora_xs": peft.lora_xs,
        "peft.use_loraplus": peft.use_loraplus,
        "peft.lora_relative_r": peft.lora_relative_r is not None,
        "model.quantization": run.model.quantization is not None,
        "optimizer": run.optimizer.preconditioned,
        "wandb.diagnostics_every": run.wandb.diagnostics_every > 0,
    }
    for key, unfit in asked.items():
        if unfit:
            value = run.optimizer.name if key == "optimizer" else flatten(run)[key]
            raise UsageError(
                f"{key}={value} is for adapters, and peft.use_peft={peft.use_peft} trains every weight: drop one of "
                "them"
            )


def check_core(run: "RunConfig") -> None:
    init, peft = run.init, run.peft
    if peft.lora_xs and not init.trains_core:
        raise UsageError(
            f"peft.lora_xs={peft.lora_xs} trains an r x r core, which {init.title} does not start: take "
            f"{methods_with(trains_core=True)}, or drop peft=lora_xs"
        )
    if init.trains_core and peft.dora:
        raise UsageError(
            f"peft.dora={peft.dora} trains magnitudes beside B and A, but {init.title} trains R alone: drop peft=dora"
        )
    if init.trains_core and peft.use_loraplus:
        raise UsageError(
            f"peft.use_loraplus={peft.use_loraplus} gives B a learning rate of its own, but {init.title} trains R "
            "alone: drop it"
        )
    if init.trains_core and run.optimizer.preconditioned:
        raise UsageError(
            f"optimizer={run.optimizer.name} preconditions B and A by each other, but {init.title} trains R alone: "
            "take optimizer=adamw or optimizer=sgd"
        )


def check_quantization(run: "RunConfig") -> None:
    init, chosen = run.init, run.model.quantization
    if chosen == "int8" and run.peft.dora:
        raise UsageError(
            "peft.dora=True takes the norms of the base's weights at every step, which PEFT cannot do for "
            "model.quantization=int8: take model.quantization=nf4, or drop peft=dora"
        )
    if chosen is not None and init.changes_base:
        raise UsageError(
            f"{init.title} changes the base's weights, which model.quantization={chosen} cannot hold: take "
            f"{methods_with(changes_base=False)}, or model.quantization=null"
        )


def check_kind(run: "RunConfig") -> None:
    """What a classification head needs, and cannot use; what is for causal models alone."""
    model, dataset = run.model, run.dataset
    run.init.check_model(model)
    if model.kind is not CAUSAL and dataset.train_on_inputs:
        raise UsageError(
            "dataset.train_on_inputs=True trains a causal model to write the prompt too, which "
            f"model.type={model.type} only reads: leave it out, or use model.type=CausalLM"
        )
    if model.kind is not CAUSAL and DATASETS[dataset.name].conversations:
        raise UsageError(
            f"dataset={dataset.name} has conversations, which only causal models are trained on: use "
            f"model.type=CausalLM instead of model.type={model.type}"
        )
    if not model.kind.has_head:
        return
    if dataset.name not in CLASSIFIED:
        raise UsageError(
            f"model.type={model.type} needs classes, and dataset={dataset.name} has texts to write: take one of "
            f"{', '.join(CLASSIFIED)}, or model.type=CausalLM"
        )
    if dataset.chat_template:
        raise UsageError(
            "dataset.chat_template=true wraps prompts, and a classification head reads the bare texts: drop it"
        )
    if model.quantization is not None:
        raise UsageError(
            f"model.quantization={model.quantization} would quantise the new head as well, which trains: take "
            "model.quantization=null, or model.type=CausalLM"
        )


def check_sharded(run: "RunConfig") -> None:
    """A sharded base is looked at and multiplied with, and stays as it is."""
    if not run.model.sharded:
        return
    init = run.init
    untouched = methods_with(reads_weights=False, changes_base=False)
    stays = not (init.reads_weights or init.shifts_base)
    whole = [key for key in ("train_embeddings", "adalora") if getattr(run.peft, key)]
    reasons = {
        f"model.type={run.model.type}: only causal models are shared out; drop it": run.model.kind is not CAUSAL,
        "peft.use_peft=False, which trains every weight; take adapters": not run.peft.use_peft,
        f"peft.{''.join(whole[:1])}=True, of which nobody has tried it; drop one of them": bool(whole),
        f"init: {init.title} reads or changes the base's weights; take {untouched}": not stays,
        "peft.dora=True takes the norms of the base's weights at every step; drop it": run.peft.dora,
        f"model.quantization={run.model.quantization} has weights of its own kind; take one of the two": (
            run.model.quantization is not None
        ),
        "model.saving=True needs the base whole; run scripts/merge.py on the finished run": run.model.saving,
        f"dataset.accuracy_examples={run.dataset.accuracy_examples}: processes would generate unlike numbers of "
        "tokens and wait for each other; set it to 0 and evaluate the adapter after": run.dataset.accuracy_examples > 0,
    }
    for reason, holds in reasons.items():
        if holds:
            raise UsageError(f"model.sharded=True does not go with {reason}")


def check_dataset(run: "RunConfig") -> None:
    dataset = run.dataset
    dataset.check()
    if dataset.path is not None:
        path = Path(dataset.path).expanduser()
        if not path.exists():
            raise UsageError(
                f"dataset.path={dataset.path} does not exist (looked in {Path.cwd()}); give a file or folder"
            )
    if str(dataset.cache).lower() in {"true", "false", ""}:
        raise UsageError(
            f"dataset.cache={dataset.cache} is not a folder: give one, null to keep nothing, or leave it out"
        )
    for evaluation in evaluations_in(dataset.decontaminate):
        if str(evaluation) not in EVALUATIONS and not Path(str(evaluation)).expanduser().exists():
            raise UsageError(
                f"dataset.decontaminate: {evaluation} is not a file or folder here (looked in {Path.cwd()}) and not "
                f"an evaluation's name; {nearest(evaluation, EVALUATIONS)}"
            )


def check_names(run: "RunConfig") -> None:
    """What becomes part of a path must be one path component."""
    for key, value in (("wandb.project", run.wandb.project), ("wandb.name", run.wandb.name)):
        if value is not None and (not value or "/" in value or value in {".", ".."} or "\0" in value):
            raise UsageError(f"{key}={value!r} becomes a folder's name: it must be non-empty and hold no slash")
    if not run.results_dir:
        raise UsageError("results_dir='' is no folder: set results_dir=<a writable folder>, . for this one")
