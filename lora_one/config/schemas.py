"""One frozen dataclass a group of the configuration, and one for each choice that reads keys of its own."""

from dataclasses import dataclass, replace
from typing import Any

from lora_one.model_kinds import MODEL_KINDS, ModelKind


@dataclass(frozen=True)
class DatasetConfig:
    """Where examples come from. Sizes count examples; null means all there are."""

    name: str
    path: str | None  # local file or folder instead of the hub
    max_train_samples: int | None
    max_eval_samples: int | None
    train_size: int | None  # the published sizes; smaller sources are split in the same proportion
    validation_size: float | None  # below 1 a share of all; null = the set's own validation split, if it has one
    max_tokens: int | None  # longer examples (prompt and response) are left out
    shuffle_seed: int | None  # null keeps the file's order
    chat_template: bool
    accuracy_examples: int  # exact match on so many validation examples along the run; 0 = none
    max_new_tokens: int  # for those
    decontaminate: Any  # evaluations whose questions no training row may hold: see evaluations_in
    cache: str | None  # a folder of large sets encoded before, see data.encoded_cache; null = encode anew each time


@dataclass(frozen=True)
class ArithmeticConfig(DatasetConfig):
    families: list[str]
    data_seed: int  # of the generated problems


@dataclass(frozen=True)
class OwnDataConfig(DatasetConfig):
    prompt: str  # column names
    response: str


@dataclass(frozen=True)
class StreamedConfig(DatasetConfig):
    rows: int  # read from the stream's start


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
    cache: str | None  # a folder of factors found before, see initialization.cache

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


PUBLISHED_GAMMAS = {"LoRA-One": 128.0, "LoRA-GA": 16.0}  # of scale=stable


@dataclass(frozen=True)
class GradientInit(ProbedInit):
    """From the mean gradient over the examples."""

    direction: str
    scale: str | None  # null = the method's own, see resolved
    search_examples: (
        int | None
    )  # for scale=search: further training examples, 0 = the gradient's; null: see initialization.probe
    normalize: str
    stable_gamma: float | None  # null = the method's own, 128 for LoRA-One
    reduction: str
    tolerance: float  # share of sigma_i^2 that each direction i of the low-rank step may miss
    memory: str  # where gradients wait: see initialization.low_rank_step.how_to_hold
    ga_direction: str  # LoRA-GA only: which singular vectors go to which factor
    eta: float | None  # LoRA-SB only: the step's size; null = see training.loop.first_step_size

    @property
    def core(self) -> bool:
        return self.direction == "LoRA-SB"

    @property
    def gamma(self) -> float:
        return self.stable_gamma if self.stable_gamma is not None else PUBLISHED_GAMMAS[self.direction]

    def resolved(self) -> "GradientInit":
        """Fill in scale and gamma: LoRA-One searches unless a gamma is given; the other methods take ``stable``.

        What means the same is then written the same, and has one folder.
        """
        search = self.direction == "LoRA-One" and self.stable_gamma is None
        scale = self.scale or ("search" if search else "stable")
        fixed = scale == "stable" and self.direction in PUBLISHED_GAMMAS
        return replace(self, scale=scale, stable_gamma=self.gamma if fixed else self.stable_gamma)


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
    niter: int | str | None  # null = our SVD; "exact" = PEFT's exact one; a number = power iterations of PEFT's other
    tolerance: float  # of our SVD: share of sigma_i^2 that each direction i may miss


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
    sharded: bool  # of several processes each holds a part of the base
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
    packing: bool  # the examples of a micro-batch in one row, without padding
    loss: str
    save_steps: int | None  # optimizer steps between resume points; null = an epoch, at most 500
    preflight: bool  # refuse a model this machine cannot train
    seed: int | None  # of dropout and a new head; null = the run's seed
    order_seed: int | None  # of the order of the training examples; null = the run's seed
    keep_epochs: bool  # leave the adapter of every epoch in epochs/<n>/

    @property
    def kind(self) -> ModelKind:
        """Return the facts about ``type``."""
        return MODEL_KINDS[self.type]


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
    diagnostics_every: int  # optimizer steps between two looks at the adapters' spectra and angles; 0 = none


DATASET_SCHEMAS: dict[str, type] = {
    "arithmetic": ArithmeticConfig,
    "flan": StreamedConfig,
    "flan_v2": StreamedConfig,
    "json": OwnDataConfig,
}
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

# those with classes
CLASSIFIED = ("boolq", "cb", "cola", "copa", "emo", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "wic")

DATASETS = (
    "alpaca",
    "alpaca_gpt4",
    "arithmetic",
    "boolq",
    "cb",
    "codefeedback",
    "cola",
    "commonsense_reasoning",
    "copa",
    "emo",
    "flan",
    "flan_v2",
    "gsm8k",
    "json",
    "meta_math",
    "meta_math_full",
    "mnli",
    "mrpc",
    "qnli",
    "qqp",
    "rte",
    "squad",
    "sst2",
    "wic",
    "wizard_lm",
)
HUB_EVALUATIONS = ("gsm8k", "humaneval", "math", "mmlu")  # known by name in dataset.decontaminate


def evaluations_in(decontaminate: Any) -> list[Any]:
    """One of HUB_EVALUATIONS, a local file or folder of an evaluation's questions, or a list of these; null is none."""
    if decontaminate is None:
        return []
    return list(decontaminate) if isinstance(decontaminate, list) else [decontaminate]
