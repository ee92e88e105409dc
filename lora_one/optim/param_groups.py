"""Parameter groups: one, or with LoRA+ (arXiv:2402.12354) a higher learning rate for B."""

from typing import Any

from torch import nn

from lora_one.config import PeftConfig


def param_groups(model: nn.Module, lr: float, weight_decay: float, peft: PeftConfig) -> list[dict[str, Any]]:
    """Trainable parameters: B apart from the rest, at ``loraplus_lr_ratio`` x lr with LoRA+ and at lr without."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not peft.use_loraplus:
        return [{"params": [parameter for _, parameter in named], "lr": lr, "weight_decay": weight_decay}]
    up = [parameter for name, parameter in named if ".lora_B." in name]
    rest = [parameter for name, parameter in named if ".lora_B." not in name]
    return [
        {"params": rest, "lr": lr, "weight_decay": weight_decay},
        {"params": up, "lr": lr * peft.loraplus_lr_ratio, "weight_decay": weight_decay},
    ]
