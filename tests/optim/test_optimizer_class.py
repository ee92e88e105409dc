"""The class that an optimizer's settings name is checked before a run loads anything."""

import dataclasses

import pytest
import torch

from lora_one.config.optimizers import OPTIMIZERS, AdamConfig, OptimizerConfig, ScaledAdamConfig, SgdConfig
from lora_one.errors import UsageError
from lora_one.optim import AdamW
from lora_one.optim.optimizer_class import arguments_of, optimizer_class


def settings_of(kind: type[OptimizerConfig], implementation: str) -> OptimizerConfig:
    """Settings of that kind with another class path; the values do not matter."""
    changed = dataclasses.dataclass(frozen=True)(type("Changed", (kind,), {"implementation": implementation}))
    return changed(**{field.name: "mine" for field in dataclasses.fields(changed)})


@pytest.mark.parametrize("kind", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_every_optimizer_has_a_class_that_accepts_its_keys(kind):
    assert issubclass(optimizer_class(settings_of(kind, kind.implementation)), torch.optim.Optimizer)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("torch.optim.AdamV", "no attribute 'AdamV'"),
        ("lora_one.optim.adam.AdamW", "No module named 'lora_one.optim.adam'"),
        ("AdamW", "Empty module name"),
        ("torch.nn.Linear", "not a subclass of torch.optim.Optimizer"),
    ],
)
def test_wrong_class_path_gives_one_message(path, reason):
    with pytest.raises(UsageError, match=rf"optimizer=mine: {path} .*{reason}.*correct Changed\.implementation"):
        optimizer_class(settings_of(AdamConfig, path))


def test_a_key_that_the_class_does_not_accept_is_named():
    with pytest.raises(UsageError, match=r"optimizer\.momentum is not an argument of torch\.optim\.AdamW.*Changed"):
        optimizer_class(settings_of(SgdConfig, "torch.optim.AdamW"))
    with pytest.raises(UsageError, match=r"optimizer\.correct_bias is not an argument of torch\.optim\.AdamW"):
        optimizer_class(settings_of(ScaledAdamConfig, "torch.optim.AdamW"))


def test_options_are_the_arguments_of_the_base_class():
    assert arguments_of(AdamW) == arguments_of(torch.optim.AdamW) | {"correct_bias"}
