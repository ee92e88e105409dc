"""What the tests of ``initialize_adapters`` and of saving its result share."""

import torch
from peft import LoraConfig
from torch import Tensor

IDS = torch.arange(3, 40).reshape(1, -1)
NEEDED = {"lora_sb": {"eta": 1e-3}, "lora_da": {"train_examples": 100}}  # settings without a default


def lora(**changes) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]} | changes)


@torch.no_grad()
def move(model) -> None:
    """Change what is trained, as training does."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" in name:
            parameter += torch.randn(parameter.shape, generator=generator) * 0.05


@torch.no_grad()
def logits(model) -> Tensor:
    return model.eval()(IDS).logits


def assert_close(found: Tensor, expected: Tensor, bound: float = 1e-4) -> None:
    """Assert that the largest difference is at most this share of the largest value."""
    assert (found - expected).abs().max() <= bound * expected.abs().max()
