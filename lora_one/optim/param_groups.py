"""Parameter groups of an optimizer: one group, or with LoRA+ (arXiv:2402.12354) a second one for B."""

from typing import TYPE_CHECKING, Any

from torch import nn

from lora_one.errors import UsageError

if TYPE_CHECKING:  # the optimizers can be used as a library without the configuration
    from lora_one.config.schemas import PeftConfig


def param_groups(model: nn.Module, lr: float, weight_decay: float, peft: "PeftConfig") -> list[dict[str, Any]]:
    """Return the trainable parameters as named groups; with LoRA+, B's learning rate is ``loraplus_lr_ratio`` x lr.

    Raises UsageError: LoRA+ is configured and no B is trainable.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    every = {"name": "all", "params": [parameter for _, parameter in named], "lr": lr, "weight_decay": weight_decay}
    if not peft.use_loraplus:
        return [every]
    up = [parameter for name, parameter in named if ".lora_B." in name]
    if not up:
        raise UsageError(
            f"peft.use_loraplus={peft.use_loraplus} sets a separate learning rate for B, but no lora_B of this model "
            "is trainable: set peft.use_loraplus=false"
        )
    rest = [parameter for name, parameter in named if ".lora_B." not in name]
    return [
        every | {"name": "others", "params": rest},
        every | {"name": "lora_B", "params": up, "lr": lr * peft.loraplus_lr_ratio},
    ]
