"""Typed, frozen settings: the composed configuration becomes a RunConfig before anything is loaded.

One dataclass a group; ``init`` and ``dataset`` have one for each mode or data set, so that a key which the
chosen mode does not read is refused like any other unknown one. No torch here: ``--help`` stays fast.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from lora_one.errors import UsageError, nearest


@dataclass(frozen=True)
class DatasetConfig:
    """Where examples come from. Sizes count examples; null means all there are."""

    name: str
    path: str | None  # local file or folder instead of the hub
    max_train_samples: int | None
    max_eval_samples: int | None
    train_size: int | None  # the published sizes; smaller sources are split in the same proportion
    validation_size: float | None  # below 1 a share of all examples
    max_tokens: int | None  # longer examples (prompt and response) are left out
    shuffle_seed: int | None  # null keeps the file's order
    chat_template: bool
    accuracy_examples: int  # exact match on so many validation examples along the run; 0 = none
    max_new_tokens: int  # for those


@dataclass(frozen=True)
class ArithmeticConfig(DatasetConfig):
    families: list[str]
    data_seed: int  # of the generated problems


@dataclass(frozen=True)
class OwnDataConfig(DatasetConfig):
    prompt: str  # column names
    response: str


@dataclass(frozen=True)
class PeftConfig:
    use_peft: bool
    lora_r: int
    lora_relative_r: float | None
    lora_target_modules: Any  # "all" or a list of name endings
    train_embeddings: bool
    use_rslora: bool
    use_loraplus: bool
    loraplus_lr_ratio: float
    lora_alpha: float
    lora_dropout: float
    dora: bool
    adalora: bool
    lora_xs: bool  # only an r x r core trains; see RunConfig.from_hydra


@dataclass(frozen=True)
class InitConfig:
    mode: str
    dtype: str  # of the adapter
    seed: int | None  # null = the run's seed
    cache: str | None  # a folder of factors found before, see start.cache

    @property
    def core(self) -> bool:
        """Whether only an r x r core between frozen factors trains."""
        return False


@dataclass(frozen=True)
class ProbedInit(InitConfig):
    """Looks at bsz x iters training examples (or sub_size with do_subsampling; or all with null)."""

    bsz: int | None
    iters: int | None
    do_subsampling: bool
    sub_size: int | None
    max_length: int | None  # tokens; null = model.max_length


@dataclass(frozen=True)
class GradientInit(ProbedInit):
    """From the mean gradient over the examples."""

    direction: str
    scale: str
    normalize: str
    stable_gamma: float | None  # null = the method's own, 128 for LoRA-One
    reduction: str
    tolerance: float  # of the captured energy: what the low-rank step may lose against the exact one
    memory: str  # where gradients wait: see steps.how_to_hold
    ga_direction: str  # LoRA-GA only: which singular vectors go to which factor
    eta: float | None  # LoRA-SB only: the step's size; null = see training.first_step_size

    @property
    def core(self) -> bool:
        return self.direction == "LoRA-SB"

    @property
    def gamma(self) -> float:
        published = {"LoRA-One": 128.0, "LoRA-GA": 16.0}
        return self.stable_gamma if self.stable_gamma is not None else published[self.direction]


@dataclass(frozen=True)
class SimpleInit(InitConfig):
    """Factors by name."""

    lora_A: str
    lora_B: str
    lora_A_std: float
    lora_B_std: float


@dataclass(frozen=True)
class SvdInit(InitConfig):
    """From the weight's own singular vectors."""

    scale: str
    stable_gamma: float | None  # null = 16
    tolerance: float

    @property
    def gamma(self) -> float:
        return self.stable_gamma if self.stable_gamma is not None else 16.0


@dataclass(frozen=True)
class PeftInit(InitConfig):
    """One of PEFT's own, computed by PEFT."""

    method: str


@dataclass(frozen=True)
class PissaInit(PeftInit):
    niter: int | None  # power iterations of a randomised SVD; null = the exact one


@dataclass(frozen=True)
class EvaInit(PeftInit, ProbedInit):
    tau: float  # cosine similarity of a component with itself one batch earlier at which it counts as settled
    whiten: bool


@dataclass(frozen=True)
class CordaInit(PeftInit, ProbedInit):
    corda_method: str


@dataclass(frozen=True)
class PeftLoraGAInit(PeftInit, ProbedInit):
    ga_direction: str
    scale: str
    stable_gamma: float | None  # null = 16

    @property
    def gamma(self) -> float:
        return self.stable_gamma if self.stable_gamma is not None else 16.0


@dataclass(frozen=True)
class LoftqInit(InitConfig):
    """From what quantising the weight lost."""

    tolerance: float


@dataclass(frozen=True)
class LoraXsInit(InitConfig):
    """Frozen factors from the weight's own singular vectors, a small random core."""

    lora_R_std: float
    tolerance: float

    @property
    def core(self) -> bool:
        return True


@dataclass(frozen=True)
class ModelConfig:
    name: str  # hub id, local folder, or bundled/tiny
    type: str
    revision: str | None
    quantization: str | None  # of the base's linear layers, by bitsandbytes
    epochs: float
    per_device_batch_size: int
    real_batch_size: int  # examples per optimizer step, over all processes
    bf16: bool
    eval_epochs: float  # epochs between two evaluations
    early_stopping_patience: int  # evaluations without a better loss; 0 = never stop early
    max_length: int  # tokens
    logging_steps: int
    learning_rate: float
    weight_decay: float
    prec_reg: float
    saving: bool
    scheduler: str
    warmup: float  # below 1 a fraction of the steps, else steps
    max_grad_norm: float
    gradient_checkpointing: bool
    loss: str
    save_steps: int | None  # optimizer steps between resume points; null = an epoch, at most 500
    preflight: bool  # refuse a model this machine cannot train


@dataclass(frozen=True)
class OptimizerConfig:
    name: str


@dataclass(frozen=True)
class AdamConfig(OptimizerConfig):
    betas: list[float]
    eps: float


@dataclass(frozen=True)
class SgdConfig(OptimizerConfig):
    momentum: float


@dataclass(frozen=True)
class ScaledConfig(OptimizerConfig):
    """Preconditioned by the partner's Gram matrix + lambda I, lambda = model.prec_reg."""

    damping: str  # lambda as it is, or relative to the Gram matrix's mean diagonal
    order: str  # both factors from the same point, or B after A's step


@dataclass(frozen=True)
class ScaledAdamConfig(AdamConfig, ScaledConfig):
    correct_bias: bool


@dataclass(frozen=True)
class ScaledSgdConfig(SgdConfig, ScaledConfig):
    pass


@dataclass(frozen=True)
class WandbConfig:
    project: str
    entity: str | None
    name: str | None  # null = made from the method and its main knobs
    mode: str
    group: str | None  # null = the configuration's hash, shared by its seeds
    tags: list[str]


@dataclass(frozen=True)
class RunConfig:
    dataset: Any
    peft: PeftConfig
    init: Any
    model: ModelConfig
    optimizer: Any
    wandb: WandbConfig
    seed: int
    results_dir: str
    overwrite: bool
    dry_run: bool

    @classmethod
    def from_hydra(cls, composed: DictConfig) -> "RunConfig":
        """Check every key, type and value.

        The r x r architecture follows from the initialisation: ``peft.lora_xs`` is set where it trains a core, and
        for LoRA-SB alpha becomes r (s = 1), whatever they were.

        Raises UsageError: a key nothing reads, a value of the wrong type or out of its range, or two that
        contradict each other.
        """
        try:
            given = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        except MissingMandatoryValue as error:
            raise UsageError(_missing(error)) from error
        except OmegaConfBaseException as error:
            key = getattr(error, "full_key", None) or "configuration"
            raise UsageError(f"{key}: {first_line(error)}; give a value, or ${{<key>}} of a key there is") from error
        given.pop("hydra", None)
        refuse_unknown("", given, cls)
        sections: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            schema = schema_of(field.name, given[field.name])
            if schema is None:
                sections[field.name] = given[field.name]
                continue
            refuse_unknown(f"{field.name}.", given[field.name], schema)
            sections[field.name] = OmegaConf.to_object(typed(f"{field.name}.", given[field.name], schema))
        typed("", {name: value for name, value in sections.items() if not dataclasses.is_dataclass(value)}, cls)
        run = cls(**sections)
        check(run)
        return with_core(run)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


DATASET_SCHEMAS: dict[str, type] = {"arithmetic": ArithmeticConfig, "json": OwnDataConfig}
INIT_SCHEMAS: dict[str, type] = {
    "gradient": GradientInit,
    "simple": SimpleInit,
    "svd": SvdInit,
    "lora_xs": LoraXsInit,
    "loftq": LoftqInit,
    "peft": PeftInit,
}
PEFT_SCHEMAS: dict[str, type] = {  # by init.method, where init.mode=peft
    "pissa": PissaInit,
    "olora": PeftInit,
    "eva": EvaInit,
    "corda": CordaInit,
    "lora_ga_peft": PeftLoraGAInit,
}
OPTIMIZER_SCHEMAS: dict[str, type] = {
    "adamw": AdamConfig,
    "scaled_adamw": ScaledAdamConfig,
    "scaled_gd": ScaledSgdConfig,
    "sgd": SgdConfig,
}
DATASETS = ("arithmetic", "gsm8k", "json", "meta_math")

CHOICES: dict[str, tuple[str, ...]] = {
    "init.direction": ("LoRA-One", "LoRA-GA", "LoRA-SB"),
    "init.ga_direction": ("ArB2r", "A2rBr", "ArBr", "random"),
    "init.memory": ("auto", "fast", "low"),
    "init.corda_method": ("ipm", "kpm"),
    "init.normalize": ("s0", "none"),
    "init.reduction": ("example", "token"),
    "init.dtype": ("fp32", "bf16"),
    "init.lora_A": ("kaiming", "fan_out_kaiming", "gaussian", "xavier", "orthogonal", "unit", "zeros"),
    "init.lora_B": ("kaiming", "fan_out_kaiming", "gaussian", "xavier", "orthogonal", "unit", "zeros"),
    "model.type": ("CausalLM",),
    "model.quantization": ("nf4", "int8"),
    "model.scheduler": ("linear", "cosine", "constant"),
    "model.loss": ("token", "example"),
    "optimizer.damping": ("absolute", "relative"),
    "optimizer.order": ("simultaneous", "sequential"),
    "wandb.mode": ("online", "offline", "disabled"),
}

# key -> (the rule in words, the rule); None values are left alone
RANGES: dict[str, tuple[str, Any]] = {
    "seed": ("an integer in [0, 2^32)", lambda v: 0 <= v < 2**32),
    "init.seed": ("an integer in [0, 2^32)", lambda v: 0 <= v < 2**32),
    "dataset.data_seed": ("an integer in [0, 2^32)", lambda v: 0 <= v < 2**32),
    "dataset.shuffle_seed": ("an integer in [0, 2^32)", lambda v: 0 <= v < 2**32),
    "peft.lora_r": ("at least 1", lambda v: v >= 1),
    "peft.lora_alpha": ("positive", lambda v: v > 0 and math.isfinite(v)),
    "peft.lora_dropout": ("in [0, 1)", lambda v: 0 <= v < 1),
    "peft.loraplus_lr_ratio": ("positive", lambda v: v > 0 and math.isfinite(v)),
    "init.stable_gamma": ("positive", lambda v: v > 0 and math.isfinite(v)),
    "init.bsz": ("at least 1", lambda v: v >= 1),
    "init.iters": ("at least 1", lambda v: v >= 1),
    "init.sub_size": ("at least 1", lambda v: v >= 1),
    "init.max_length": ("at least 2 tokens", lambda v: v >= 2),
    "init.tolerance": ("in (0, 1)", lambda v: 0 < v < 1),
    "init.niter": ("not negative", lambda v: v >= 0),
    "init.tau": ("in [0, 1)", lambda v: 0 <= v < 1),
    "init.lora_A_std": ("not negative", lambda v: v >= 0 and math.isfinite(v)),
    "init.lora_B_std": ("not negative", lambda v: v >= 0 and math.isfinite(v)),
    "init.lora_R_std": ("not negative", lambda v: v >= 0 and math.isfinite(v)),
    "init.eta": ("positive", lambda v: v > 0 and math.isfinite(v)),
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
    "dataset.max_tokens": ("at least 2", lambda v: v >= 2),
    "dataset.accuracy_examples": ("0 (none) or more", lambda v: v >= 0),
    "dataset.max_new_tokens": ("at least 1", lambda v: v >= 1),
}


def schema_of(section: str, given: Any) -> type | None:
    """The dataclass of one section; None for a plain value."""
    if section == "dataset":
        name = given.get("name")
        if name not in DATASETS:
            raise UsageError(f"dataset.name={name} is not a data set; {nearest(name, DATASETS)}")
        return DATASET_SCHEMAS.get(name, DatasetConfig)
    if section == "init":
        mode = given.get("mode")
        if mode not in INIT_SCHEMAS:
            raise UsageError(f"init.mode={mode} is not a kind of initialisation; {nearest(mode, INIT_SCHEMAS)}")
        method = given.get("method")
        if mode == "peft" and method not in PEFT_SCHEMAS:
            raise UsageError(f"init.method={method} is not an initialisation of PEFT; {nearest(method, PEFT_SCHEMAS)}")
        return PEFT_SCHEMAS[method] if mode == "peft" else INIT_SCHEMAS[mode]
    if section == "optimizer":
        name = given.get("name")
        if name not in OPTIMIZER_SCHEMAS:
            raise UsageError(f"optimizer.name={name} is not an optimizer; {nearest(name, OPTIMIZER_SCHEMAS)}")
        return OPTIMIZER_SCHEMAS[name]
    return {"peft": PeftConfig, "model": ModelConfig, "wandb": WandbConfig}.get(section)


def valid_keys(section: str) -> set[str]:
    """Every key that some choice of a section reads; of the whole configuration for ``""``."""
    one_of_many = {
        "dataset": (DatasetConfig, *DATASET_SCHEMAS.values()),
        "init": (*INIT_SCHEMAS.values(), *PEFT_SCHEMAS.values()),
        "optimizer": tuple(OPTIMIZER_SCHEMAS.values()),
    }
    single = {
        "": RunConfig,
        "peft": PeftConfig,
        "model": ModelConfig,
        "wandb": WandbConfig,
    }
    schemas = one_of_many.get(section) or (single.get(section, RunConfig),)
    return {field.name for schema in schemas for field in dataclasses.fields(schema)}


def refuse_unknown(prefix: str, given: dict[str, Any], schema: type) -> None:
    fields = {field.name for field in dataclasses.fields(schema)}
    for key in given:
        if key not in fields:
            raise UsageError(f"unknown key {prefix}{key}: nothing here reads it; {nearest(key, fields)}")
    missing = dataclasses.MISSING
    required = (f.name for f in dataclasses.fields(schema) if f.default is missing and f.default_factory is missing)
    for name in required:
        if name not in given:
            raise UsageError(f"{prefix}{name} is missing: set {prefix}{name}=<value>")


def typed(prefix: str, given: dict[str, Any], schema: type) -> DictConfig:
    """Merge into the dataclass; OmegaConf's rules decide the types (``1`` is a float, ``a`` no int)."""
    try:
        return OmegaConf.merge(OmegaConf.structured(schema), given)
    except OmegaConfBaseException as error:
        key = (error.full_key or str(error.key)).split("[")[0]
        hint = next(field.type for field in dataclasses.fields(schema) if field.name == key)
        kind = getattr(hint, "__name__", None) or str(hint).replace("None", "null").replace(" | ", " or ")
        value = "null" if given[key] is None else repr(given[key])
        raise UsageError(f"{prefix}{key}={value} has the wrong type: {kind} is wanted") from error


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


def _missing(error: ConfigKeyError) -> str:
    key = getattr(error, "full_key", None) or first_line(error)
    return f"{key} must be given and has no default: set {key}=<value>"


def flatten(run: RunConfig) -> dict[str, Any]:
    """Dotted key -> value, one level of sections."""
    flat: dict[str, Any] = {}
    for key, value in run.to_dict().items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": item for inner, item in value.items()}
        else:
            flat[key] = value
    return flat


def check(run: RunConfig) -> None:
    """Values against their ranges and against each other; the first violation is raised."""
    check_values(flatten(run))
    for together in (check_batches, check_peft, check_core, check_quantization, check_dataset, check_names):
        together(run)
    check_init(run.init)


def check_values(flat: dict[str, Any]) -> None:
    for key, valid in CHOICES.items():
        if flat.get(key) is not None and flat[key] not in valid:
            raise UsageError(f"{key}={flat[key]} is not a choice; {nearest(flat[key], valid)}")
    for key, (rule, holds) in RANGES.items():
        value = flat.get(key)
        if value is not None and not holds(value):
            raise UsageError(f"{key}={value} is out of range: it must be {rule}")


def check_batches(run: RunConfig) -> None:
    real, device = run.model.real_batch_size, run.model.per_device_batch_size
    if real % device:
        raise UsageError(
            f"model.real_batch_size={real} is not divisible by model.per_device_batch_size={device}; "
            f"take a multiple of {device} such as {max(device, real - real % device)}, or a smaller "
            "model.per_device_batch_size"
        )


def check_peft(run: RunConfig) -> None:
    targets = run.peft.lora_target_modules
    is_list = isinstance(targets, list) and targets and all(isinstance(name, str) for name in targets)
    if targets != "all" and not is_list:
        raise UsageError(
            f"peft.lora_target_modules={targets!r} must be the word all or a list of layer names such as "
            "[q_proj,v_proj]"
        )
    not_built = {
        "peft.use_peft": run.peft.use_peft is False,
        "peft.lora_relative_r": run.peft.lora_relative_r is not None,
        "peft.train_embeddings": run.peft.train_embeddings,
        "peft.adalora": run.peft.adalora,
    }
    for key, asked in not_built.items():
        if asked:
            value = flatten(run)[key]
            raise UsageError(f"{key}={value} is not built yet; leave {key} at its default")


def check_init(init: InitConfig) -> None:
    by_gradient = ("stable", "gd", "unit", "weightS")
    scales = {
        GradientInit: (*by_gradient, "search"),
        PeftLoraGAInit: by_gradient,
        SvdInit: ("default", "stable", "unit", "normalized"),
    }
    if type(init) in scales and init.scale not in scales[type(init)]:
        raise UsageError(
            f"init.scale={init.scale} is not a choice of init.mode={init.mode}; "
            f"{nearest(init.scale, scales[type(init)])}"
        )
    if hasattr(init, "stable_gamma") and init.scale != "stable" and init.stable_gamma is not None:
        raise UsageError(
            f"init.stable_gamma={init.stable_gamma} is read only with init.scale=stable, not with "
            f"init.scale={init.scale}: drop one of the two"
        )
    if isinstance(init, GradientInit):
        check_gradient(init)
    if isinstance(init, ProbedInit):
        check_probed(init)


def check_gradient(init: GradientInit) -> None:
    if init.direction != "LoRA-One" and init.normalize != "s0":
        raise UsageError(f"init.normalize={init.normalize} is read only by LoRA-One, not by {init.direction}: drop it")
    if init.direction != "LoRA-GA" and init.ga_direction != "ArB2r":
        raise UsageError(
            f"init.ga_direction={init.ga_direction} is read only by LoRA-GA, not by {init.direction}: drop it"
        )
    if init.direction != "LoRA-SB" and init.eta is not None:
        raise UsageError(f"init.eta={init.eta} is read only by LoRA-SB, not by {init.direction}: drop it")
    if init.scale == "search" and init.direction == "LoRA-GA":
        raise UsageError(
            "init.scale=search looks for the gamma with the least loss after the start, and LoRA-GA's start leaves the "
            "function and the loss as they are: take init.scale=stable with init.stable_gamma"
        )
    for key, unset in (("scale", "stable"), ("stable_gamma", None)):
        value = getattr(init, key)
        if init.direction == "LoRA-SB" and value != unset:
            raise UsageError(f"init.{key}={value} is not read by LoRA-SB, whose step has the size init.eta: drop it")


def check_probed(init: ProbedInit) -> None:
    if init.do_subsampling and init.sub_size is None:
        raise UsageError("init.do_subsampling=true needs a size: set init.sub_size=<number of examples>")
    if init.sub_size is not None and not init.do_subsampling:
        raise UsageError(
            f"init.sub_size={init.sub_size} is read only with init.do_subsampling=true: add it, or drop init.sub_size"
        )
    if not init.do_subsampling and (init.bsz is None) != (init.iters is None):
        raise UsageError(
            f"init.bsz={init.bsz} with init.iters={init.iters}: give both (bsz x iters examples) or set both to null "
            "(the whole training set)"
        )


def check_core(run: RunConfig) -> None:
    init, peft = run.init, run.peft
    name = getattr(init, "direction", init.mode)
    if peft.lora_xs and not init.core:
        raise UsageError(
            f"peft.lora_xs={peft.lora_xs} trains an r x r core, which {name} does not start: take init=lora_xs or "
            "init.direction=LoRA-SB, or drop peft=lora_xs"
        )
    if init.core and peft.dora:
        raise UsageError(
            f"peft.dora={peft.dora} trains magnitudes beside B and A, but {name} trains R alone: drop peft=dora"
        )
    if init.core and peft.use_loraplus:
        raise UsageError(
            f"peft.use_loraplus={peft.use_loraplus} gives B a learning rate of its own, but {name} trains R alone: "
            "drop it"
        )
    if init.core and isinstance(run.optimizer, ScaledConfig):
        raise UsageError(
            f"optimizer={run.optimizer.name} preconditions B and A by each other, but {name} trains R alone: take "
            "optimizer=adamw or optimizer=sgd"
        )


def check_quantization(run: RunConfig) -> None:
    init, chosen = run.init, run.model.quantization
    if isinstance(init, LoftqInit) and chosen is None:
        raise UsageError(
            "init=loftq makes up for what quantising the base lost, and model.quantization=null leaves the base as it "
            "is: add model.quantization=nf4, or take init=pissa"
        )
    if chosen == "int8" and run.peft.dora:
        raise UsageError(
            "peft.dora=True takes the norms of the base's weights at every step, which PEFT cannot do for "
            "model.quantization=int8: take model.quantization=nf4, or drop peft=dora"
        )
    name = getattr(init, "direction", None) or getattr(init, "method", init.mode)
    shifts = isinstance(init, PeftInit | SvdInit) and name != "eva"
    if chosen is not None and (shifts or name == "LoRA-GA"):
        raise UsageError(
            f"{name} changes the base's weights, which model.quantization={chosen} cannot hold: take LoRA-One, "
            "init=default, lora_xs, eva or loftq, or model.quantization=null"
        )


def with_core(run: RunConfig) -> RunConfig:
    """The run with the architecture that its initialisation chooses."""
    if not run.init.core:
        return run
    peft = dataclasses.replace(run.peft, lora_xs=True)
    if isinstance(run.init, GradientInit):  # R0 is the step itself, so s = 1
        peft = dataclasses.replace(peft, lora_alpha=float(peft.lora_r), use_rslora=False)
    return dataclasses.replace(run, peft=peft)


def check_dataset(run: RunConfig) -> None:
    dataset = run.dataset
    if isinstance(dataset, ArithmeticConfig):
        check_arithmetic(dataset)
    if isinstance(dataset, OwnDataConfig) and dataset.path is None:
        raise UsageError("dataset=json needs the file: add dataset.path=<file.jsonl>")
    if dataset.path is not None:
        path = Path(dataset.path).expanduser()
        if not path.exists():
            raise UsageError(
                f"dataset.path={dataset.path} does not exist (looked in {Path.cwd()}); give a file or folder"
            )


def check_arithmetic(dataset: ArithmeticConfig) -> None:
    if dataset.path is not None:
        return
    for key in ("train_size", "validation_size"):
        size = getattr(dataset, key)
        if size is None or size < 1:
            shown = "null" if size is None else size
            raise UsageError(f"dataset.{key}={shown}: generated problems need a number; set dataset.{key}=<examples>")


def check_names(run: RunConfig) -> None:
    """What becomes part of a path must be one path component."""
    for key, value in (("wandb.project", run.wandb.project), ("wandb.name", run.wandb.name)):
        if value is not None and (not value or "/" in value or value in {".", ".."} or "\0" in value):
            raise UsageError(f"{key}={value!r} becomes a folder's name: it must be non-empty and hold no slash")
    if not run.results_dir:
        raise UsageError("results_dir='' is no folder: set results_dir=<a writable folder>, . for this one")
