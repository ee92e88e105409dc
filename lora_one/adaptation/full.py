"""Full fine-tuning: every weight is trained, in fp32."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from lora_one.adaptation.merging import save_merged
from lora_one.adaptation.protocol import Adaptation
from lora_one.config.methods import MethodSettings
from lora_one.config.schemas import ModelConfig
from lora_one.models import DTYPES


@dataclass(frozen=True)
class FullFineTuning(Adaptation):
    """Train every weight.

    bf16: save the final weights in bf16; those of an epoch are saved in fp32.  tokenizer: saved with the weights.
    """

    tokenizer: Any
    bf16: bool

    artifact: ClassVar[str] = "merged_checkpoint"

    def base_dtype(self, model: ModelConfig) -> str:
        return "fp32"  # optimizer steps are smaller than the digits of a 16-bit weight

    def layers(self, model: nn.Module, method: MethodSettings | None = None) -> dict[str, nn.Module]:
        return {}

    def trainable_parameters(self, model: nn.Module) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    def start(self, base: nn.Module, steps: int) -> nn.Module:
        return base.requires_grad_(True)

    def save(self, model: nn.Module, place: Path, *, final: bool = True) -> None:
        save_merged(model.to(DTYPES["bf16"]) if final and self.bf16 else model, self.tokenizer, place)
