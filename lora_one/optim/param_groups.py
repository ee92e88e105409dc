"""Parameter groups: one, or with LoRA+ (arXiv:2402.12354) a higher learning rate for B."""

from typing import TYPE_CHECKING, Any

from torch import nn

from lora_one.errors import UsageError

if TYPE_CHECKING:  # a library user of an optimiser needs no configuration
    from lora_one.config.schemas import PeftConfig


def param_groups(model: nn.Module, lr: float, weight_decay: float, peft: "PeftConfig") -> list[dict[str, Any]]:
    """Trainable parameters: with LoRA+ B apart from the rest, at ``loraplus_lr_ratio`` x lr. A group has a ``name``.

    Raises UsageError: with LoRA+, no B trains.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    every = {"name": "all", "params": [parameter for _, parameter in named], "lr": lr, "weight_decay": weight_decay}
    if not peft.use_loraplus:
        return [every]
    up = [parameter for name, parameter in named if ".lora_B." in name]
    if not up:
        raise UsageError(
            f"peft.use_loraplus={peft.use_loraplus} gives B a learning rate of its own, but no lora_B of this model "
            "trains: drop it"
        )
    rest = [parameter for name, parameter in named if ".lora_B." not in name]
    return [
        every | {"name": "others", "params": rest},
        every | {"name": "lora_B", "params": up, "lr": lr * peft.loraplus_lr_ratio},
    ]
