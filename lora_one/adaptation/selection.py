"""Select what is trained, by the configuration."""

from pathlib import Path
from typing import Any

from lora_one.adaptation.adalora import AdaLora
from lora_one.adaptation.full import FullFineTuning
from lora_one.adaptation.lora import Lora, LoraCore
from lora_one.adaptation.protocol import Adaptation
from lora_one.config import RunConfig


def adaptation_of(run: RunConfig, initial_factors: Path, tokenizer: Any = None) -> Adaptation:
    """Return the adaptation that the configuration selects.

    initial_factors: the run's file with (B0, A0), see `Lora`.  tokenizer: saved with a model that trains as a whole.
    """
    if run.peft.trains_base:
        return FullFineTuning(tokenizer, run.model.bf16)
    if run.peft.adalora:
        return AdaLora(run.peft, run.init.dtype, initial_factors, run.init_seed)
    lora = LoraCore if run.peft.lora_xs else Lora
    return lora(run.peft, run.init.dtype, initial_factors)
