"""The settings of peft, model and wandb, one frozen dataclass each."""

from dataclasses import dataclass
from typing import Any

from lora_one.model_kinds import MODEL_KINDS, ModelKind

NODE = "node"  # value of model.sharded


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
    lora_xs: bool  # train only an r x r core; RunConfig.from_hydra sets it for methods that need it

    @property
    def trains_base(self) -> bool:
        """Return whether every weight of the base trains, instead of adapters."""
        return not self.use_peft

    @property
    def own_start(self) -> str | None:
        """Return the name of a start that needs no initialisation method, as in run.json; None: a method is needed."""
        if self.trains_base:
            return "full fine-tuning"
        return "AdaLoRA" if self.adalora else None


@dataclass(frozen=True)
class ModelConfig:
    name: str  # hub id, local folder, or bundled/tiny
    type: str
    revision: str | None
    quantization: str | None  # format of the base's linear layers in bitsandbytes; null = not quantised
    sharded: bool | int | str  # each process stores a part of the base: of all processes, so many, or those of a node
    epochs: float
    per_device_batch_size: int
    real_batch_size: int  # examples per optimizer step, over all processes
    bf16: bool
    eval_epochs: float  # epochs between evaluations
    early_stopping_patience: int  # stop after this many evaluations without a lower loss; 0 = never
    max_length: int  # tokens
    logging_steps: int
    learning_rate: float
    weight_decay: float
    prec_reg: float
    saving: bool
    scheduler: str
    warmup: float  # below 1: a fraction of all steps; otherwise a number of steps
    max_grad_norm: float
    gradient_checkpointing: bool
    packing: bool  # concatenate the examples of a micro-batch in one row, without padding
    loss: str
    save_steps: int | None  # optimizer steps between resume points; null = one epoch, at most 500
    preflight: bool  # refuse a model that is too large for this machine
    seed: int | None  # of dropout and a new classification head; null = the run's seed
    order_seed: int | None  # of the order of the training examples; null = the run's seed
    keep_epochs: bool  # save the adapter of every epoch in epochs/<n>/

    @property
    def kind(self) -> ModelKind:
        """Return the kind of model that ``type`` names."""
        return MODEL_KINDS[self.type]

    def shards(self, processes: int) -> int:
        """Return how many processes share one copy of the base; 1: each has a whole one.

        ``models.with_shards`` replaces ``sharded=node`` by a number first.
        """
        return processes if self.sharded is True else int(self.sharded) or 1


@dataclass(frozen=True)
class WandbConfig:
    project: str
    entity: str | None
    name: str | None  # null = made from the method and its main settings
    mode: str
    group: str | None  # null = the configuration's hash, shared by its seeds
    tags: list[str]
    diagnostics_every: int  # optimizer steps between records of the adapters' spectra and angles; 0 = none
    curvature_examples: int  # training examples on which the curvature at the start is measured; 0 = not measured
    curvature_by_layer: bool  # also of each layer alone


@dataclass(frozen=True)
class PlanConfig:
    """What a dry run plans for, instead of this machine."""

    processes: int | None  # one device each; null = those of the launcher
    hardware: str | None  # a name in conf/hardware, or the path of a YAML file

    @property
    def given(self) -> bool:
        """Return whether the run is planned for another machine."""
        return self.processes is not None or self.hardware is not None
