"""Rules of single values. Those of init and optimizer are in their settings classes."""

import math

from lora_one.config.checked import SEED, Choices, Ranges
from lora_one.model_kinds import MODEL_KINDS

CHOICES: Choices = {
    "model.type": tuple(MODEL_KINDS),
    "model.quantization": ("nf4", "int8"),
    "model.scheduler": ("linear", "cosine", "constant"),
    "model.loss": ("token", "example"),
    "wandb.mode": ("online", "offline", "disabled"),
}

RANGES: Ranges = {
    "seed": SEED,
    "process_timeout_s": ("at least 1 second", lambda v: v >= 1 and math.isfinite(v)),
    "model.seed": SEED,
    "model.order_seed": SEED,
    "dataset.data_seed": SEED,
    "dataset.shuffle_seed": SEED,
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
    "dataset.max_train_samples": ("at least 1", lambda v: v >= 1),
    "dataset.max_eval_samples": ("at least 1", lambda v: v >= 1),
    "dataset.train_size": ("at least 1", lambda v: v >= 1),
    "dataset.validation_size": (
        "a share above 0 and below 1, or a number of examples",
        lambda v: 0 < v < 1 or v == int(v) >= 1,
    ),
    "plan.processes": ("at least 1", lambda v: v >= 1),
    "dataset.rows": ("at least 1", lambda v: v >= 1),
    "dataset.max_tokens": ("at least 2", lambda v: v >= 2),
    "dataset.accuracy_examples": ("0 (none) or more", lambda v: v >= 0),
    "dataset.max_new_tokens": ("at least 1", lambda v: v >= 1),
    "wandb.diagnostics_every": ("0 (never) or a number of steps", lambda v: v >= 0),
    "wandb.curvature_examples": ("0 (not measured) or a number of examples", lambda v: v >= 0),
}
