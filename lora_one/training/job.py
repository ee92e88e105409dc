"""What training needs besides the model and its examples."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from lora_one.adaptation.layers import FactorPairs
from lora_one.adaptation.protocol import Adaptation
from lora_one.config import RunConfig
from lora_one.records.tracking import Tracker

Evaluate = Callable[[nn.Module], dict[str, float]]


@dataclass(frozen=True)
class TrainingJob:
    """Settings, folders and functions of one training.

    checkpoints: folder of the resume points.  evaluate: returns eval_loss and other metrics; None: no evaluation.
    keep_epoch: called with n after the n-th epoch.
    gradients: (U_r, Vh_r) of each layer's initial gradient, for the diagnostics; empty if there was no gradient.
    """

    run: RunConfig
    adaptation: Adaptation
    tracker: Tracker
    checkpoints: Path
    pad_id: int
    evaluate: Evaluate | None = None
    keep_epoch: Callable[[int], None] | None = None
    gradients: FactorPairs = field(default_factory=dict)
