"""Check the values of a configuration: each by itself, and combinations of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_one.config.checked import check_values
from lora_one.config.methods import methods_with
from lora_one.config.ranges import CHOICES, RANGES
from lora_one.config.schemas import NODE
from lora_one.datasets import CLASSIFIED, DATASETS
from lora_one.datasets.questions import EVALUATIONS, evaluations_in
from lora_one.errors import UsageError, nearest
from lora_one.model_kinds import CAUSAL

if TYPE_CHECKING:
    from lora_one.config import RunConfig


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration as one dictionary: dotted key -> value."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": item for inner, item in value.items()}
        else:
            flat[key] = value
    return flat


def check(run: "RunConfig") -> None:
    """Check every value, then combinations of values. Raises UsageError for the first violation."""
    check_values(flatten(run.to_dict()), CHOICES, RANGES)
    run.init.check_values()
    run.optimizer.check_values()
    for together in (check_batches, check_peft, check_core, check_kind, check_quantization):
        together(run)
    for together in (check_dataset, check_caches, check_names, check_sharded):
        together(run)
    check_plan(run)
    run.init.check()
    run.optimizer.check(run.model, run.peft)


def largest_divisor(number: int, at_most: int) -> int:
    """Return the largest divisor of a number up to a limit.

    >>> largest_divisor(24, 10)
    8
    """
    return next(size for size in range(at_most, 0, -1) if number % size == 0)


def check_batches(run: "RunConfig") -> None:
    real, device = run.model.real_batch_size, run.model.per_device_batch_size
    if real % device:
        raise UsageError(
            f"model.real_batch_size={real} is not divisible by model.per_device_batch_size={device}: set it to a "
            f"multiple of {device}, such as {max(device, real - real % device)}, or lower model.per_device_batch_size"
        )
    if run.model.packing and run.model.kind is not CAUSAL:
        raise UsageError(
            f"model.packing={run.model.packing} works only with causal models, not with model.type={run.model.type}: "
            "set model.packing=false"
        )


def check_peft(run: "RunConfig") -> None:
    targets = run.peft.lora_target_modules
    is_list = isinstance(targets, list) and targets and all(isinstance(name, str) for name in targets)
    if targets != "all" and not is_list:
        raise UsageError(
            f"peft.lora_target_modules={targets!r} must be all, or a list of layer names, such as [q_proj,v_proj]"
        )
    if run.init.steps_weights and run.peft.use_peft:
        raise UsageError(
            f"init={run.init.method} changes the weights and initialises no adapters: add peft=full_ft, or another init"
        )
    if run.peft.adalora:
        check_adalora(run)
    if run.peft.train_embeddings and run.model.kind.has_decoder:
        raise UsageError(
            "peft.train_embeddings=True does not work with an encoder-decoder: its modules share one embedding weight, "
            "which PEFT does not keep tied; set peft=all or peft=full_ft"
        )
    if not run.peft.use_peft:
        check_full(run)
    check_curvature(run)


def check_curvature(run: "RunConfig") -> None:
    """Refuse the curvature where a Hessian-vector product is not possible."""
    wandb = run.wandb
    if wandb.curvature_by_layer and not wandb.curvature_examples:
        raise UsageError(
            "wandb.curvature_by_layer=True needs the number of examples: set wandb.curvature_examples=<number>"
        )
    for key in ("sharded", "quantization"):
        if wandb.curvature_examples and getattr(run.model, key):
            raise UsageError(
                f"wandb.curvature_examples={wandb.curvature_examples} needs second derivatives, which a base with "
                f"model.{key}={getattr(run.model, key)} does not have: remove one of the two"
            )


def check_adalora(run: "RunConfig") -> None:
    """Refuse settings that AdaLoRA cannot use, because it has its own initialisation, factors and scaling."""
    if not run.init.plain:
        raise UsageError(
            f"peft.adalora=True has its own initialisation and cannot use {run.init.title}: remove init=..., or set "
            "peft=all"
        )
    refuse_for_adapters(run, "adapters of two factors, but AdaLoRA (peft.adalora=True) has three")


def check_full(run: "RunConfig") -> None:
    """Refuse settings of adapters when every weight is trained."""
    init, peft = run.init, run.peft
    full = f"peft.use_peft={peft.use_peft} trains every weight"
    if not ((init.plain and init.zero_start) or init.steps_weights):
        raise UsageError(
            f"{full}, so there are no adapters that {init.title} could initialise: remove init=..., or set peft=all"
        )
    more = {
        "peft.lora_relative_r": peft.lora_relative_r is not None,
        "model.quantization": run.model.quantization is not None,
    }
    refuse_for_adapters(run, f"adapters, but {full}", more)


def refuse_for_adapters(run: "RunConfig", reason: str, more: Mapping[str, bool] | None = None) -> None:
    """Raise UsageError if a setting is used that only works with LoRA's factors B and A.

    reason: continues "<key>=<value> works only with".  more: further keys, and whether they are used.
    """
    used = {
        "peft.dora": run.peft.dora,
        "peft.lora_xs": run.peft.lora_xs,
        "peft.use_loraplus": run.peft.use_loraplus,
        **(more or {}),
        "optimizer": run.optimizer.needs_pairs,
        "wandb.diagnostics_every": run.wandb.diagnostics_every > 0,
        "wandb.curvature_examples": run.wandb.curvature_examples > 0,
    }
    for key in (key for key, is_used in used.items() if is_used):
        value = run.optimizer.name if key == "optimizer" else flatten(run.to_dict())[key]
        raise UsageError(f"{key}={value} works only with {reason}: remove one of the two")


def check_core(run: "RunConfig") -> None:
    init, peft = run.init, run.peft
    if peft.lora_xs and not init.trains_core:
        raise UsageError(
            f"peft.lora_xs={peft.lora_xs} trains an r x r core, which {init.title} does not initialise: set "
            f"{methods_with(trains_core=True)}, or remove peft=lora_xs"
        )
    if not init.trains_core:
        return
    only_R = f"but {init.title} trains only R"
    if peft.dora:
        raise UsageError(f"peft.dora={peft.dora} trains magnitudes as well as B and A, {only_R}: remove peft=dora")
    if peft.use_loraplus:
        raise UsageError(
            f"peft.use_loraplus={peft.use_loraplus} sets a separate learning rate for B, {only_R}: set "
            "peft.use_loraplus=false"
        )
    if run.optimizer.needs_pairs:
        does = "preconditions the gradients of B and A" if run.optimizer.preconditioned else "steps B and A together"
        raise UsageError(f"optimizer={run.optimizer.name} {does}, {only_R}: set optimizer=adamw or optimizer=sgd")


def check_quantization(run: "RunConfig") -> None:
    init, chosen = run.init, run.model.quantization
    if chosen == "int8" and run.peft.dora:
        raise UsageError(
            "peft.dora=True needs the norms of the base weights at every step, which PEFT cannot compute with "
            "model.quantization=int8: set model.quantization=nf4, or remove peft=dora"
        )
    if chosen is not None and init.shifts_base:
        raise UsageError(
            f"{init.title} changes the base weights, which is not possible with model.quantization={chosen}: set "
            f"{methods_with(changes_base=False)}, or model.quantization=null"
        )


def check_kind(run: "RunConfig") -> None:
    """Check the kind of model: the method must work with it, and a classification head excludes some settings."""
    model, dataset = run.model, run.dataset
    run.init.check_model(model)
    if model.kind is not CAUSAL and dataset.train_on_inputs:
        raise UsageError(
            "dataset.train_on_inputs=True trains a causal model to write the prompt too, which "
            f"model.type={model.type} only reads: leave it out, or use model.type={CAUSAL.name}"
        )
    if model.kind is not CAUSAL and DATASETS[dataset.name].conversations:
        raise UsageError(
            f"dataset={dataset.name} has conversations, which only causal models are trained on: use "
            f"model.type={CAUSAL.name} instead of model.type={model.type}"
        )
    if not model.kind.has_head:
        return
    if dataset.name not in CLASSIFIED:
        raise UsageError(
            f"model.type={model.type} needs a data set with classes, which dataset={dataset.name} does not have: set "
            f"dataset to one of {', '.join(CLASSIFIED)}, or model.type={CAUSAL.name}"
        )
    if dataset.chat_template:
        raise UsageError(
            f"dataset.chat_template=True formats prompts, but model.type={model.type} classifies texts without a "
            "prompt: set dataset.chat_template=false"
        )
    if model.quantization is not None:
        raise UsageError(
            f"model.quantization={model.quantization} would also quantise the new classification head, which is "
            f"trained: set model.quantization=null, or model.type={CAUSAL.name}"
        )


def check_sharded(run: "RunConfig") -> None:
    """Refuse what does not work with a sharded base: its weights can be used, but not changed or read as a whole."""
    init, peft, model = run.init, run.peft, run.model
    sharded = model.sharded
    if not (isinstance(sharded, bool) or sharded == NODE or (isinstance(sharded, int) and sharded > 1)):
        raise UsageError(
            f"model.sharded={sharded} must be false, true (over all processes), {NODE} (over those of each node), or "
            "the number of processes that share one copy of the base, at least 2"
        )
    if not sharded:
        return
    without_weights = methods_with(reads_weights=False, changes_base=False)
    examples = run.dataset.accuracy_examples
    problems = {
        f"model.type={model.type}: only causal models can be sharded": model.kind is not CAUSAL,
        "peft.use_peft=False, which trains every weight: train adapters": not peft.use_peft,
        "peft.train_embeddings=True (untested): remove one of the two": peft.train_embeddings,
        "peft.adalora=True (untested): remove one of the two": peft.adalora,
        f"{init.title}, which reads or changes the base weights: set {without_weights}": (
            init.reads_weights or init.shifts_base
        ),
        "peft.dora=True, which needs the norms of the base weights at every step: remove it": peft.dora,
        f"model.quantization={model.quantization}: remove one of the two": model.quantization is not None,
        "model.saving=True, which needs the whole base: run scripts/merge.py after the run": model.saving,
        f"dataset.accuracy_examples={examples}: processes that generate different numbers of tokens would wait for "
        "each other; set dataset.accuracy_examples=0 and evaluate the adapter after the run": examples > 0,
    }
    for problem, found in problems.items():
        if found:
            raise UsageError(f"model.sharded={sharded} does not work with {problem}")


def check_dataset(run: "RunConfig") -> None:
    dataset = run.dataset
    dataset.check()
    if dataset.path is not None:
        path = Path(dataset.path).expanduser()
        if not path.exists():
            raise UsageError(
                f"dataset.path={dataset.path} does not exist (relative to {Path.cwd()}): set it to an existing file or "
                "folder"
            )
    for evaluation in evaluations_in(dataset.decontaminate):
        if str(evaluation) not in EVALUATIONS and not Path(str(evaluation)).expanduser().exists():
            raise UsageError(
                f"dataset.decontaminate={evaluation} is neither an existing file or folder (relative to {Path.cwd()}) "
                f"nor the name of an evaluation; {nearest(evaluation, EVALUATIONS)}"
            )


def check_caches(run: "RunConfig") -> None:
    for key, folder in (("dataset.cache", run.dataset.cache), ("init.cache", run.init.cache)):
        if str(folder).lower() in {"true", "false", ""}:
            raise UsageError(
                f"{key}={folder} must be a folder: set a path, or null to cache nothing, or remove the key"
            )


def check_names(run: "RunConfig") -> None:
    """Check that names that become folders are valid folder names."""
    for key, value in (("wandb.project", run.wandb.project), ("wandb.name", run.wandb.name)):
        if value is not None and (not value or "/" in value or value in {".", ".."} or "\0" in value):
            raise UsageError(
                f"{key}={value!r} becomes the name of a folder: it must not be empty, . or .., or contain a slash"
            )
    if not run.results_dir:
        raise UsageError("results_dir='' is not a folder: set results_dir=<a writable folder>, or . for this folder")


def check_plan(run: "RunConfig") -> None:
    """Refuse keys of the plan in a run that is not only planned, because they would change nothing."""
    for key, value in run.to_dict()["plan"].items():
        if value is not None and not run.dry_run:
            raise UsageError(f"plan.{key}={value} is read only by a dry run: add dry_run=true, or remove plan.{key}")
