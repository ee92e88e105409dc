"""What every conf/optimizer must keep."""

import copy

import pytest
import torch
import yaml

from lora_one.config.optimizers import OPTIMIZERS
from lora_one.data.encode import batches_of
from lora_one.losses import mean_loss
from lora_one.models import DTYPES
from lora_one.optim import build_optimizer
from tests.helpers.examples import examples
from tests.helpers.paths import ROOT
from tests.helpers.runs import run_config
from tests.helpers.training import adapted

CHOICES = sorted(path.stem for path in (ROOT / "conf/optimizer").glob("*.yaml"))


def stepped(model, optimizer, batch, count):
    for _ in range(count):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters() if parameter.requires_grad]


def steps_pairs(choice):
    return OPTIMIZERS[yaml.safe_load((ROOT / f"conf/optimizer/{choice}.yaml").read_text())["name"]].steps_pairs


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("choice", "loraplus"),
    [(choice, loraplus) for choice in CHOICES for loraplus in (False, True) if not (loraplus and steps_pairs(choice))],
)
def test_every_optimizer_goes_downhill_and_can_be_saved_and_copied(choice, loraplus, dtype):
    changes = [
        f"optimizer={choice}",
        f"peft.use_loraplus={loraplus}",
        "peft.loraplus_lr_ratio=2",
        f"init.dtype={dtype}",
    ]
    run = run_config(
        "init=gaussian", "init.lora_B=gaussian", "model.learning_rate=3e-3", "model.prec_reg=1e-2", *changes
    )
    model = adapted(run).eval()
    (batch,) = batches = batches_of(examples(6), 6, 0)
    optimizer = build_optimizer(model, run)
    assert {p.dtype for group in optimizer.param_groups for p in group["params"]} == {DTYPES[dtype]}
    before = mean_loss(model, batches, "token")
    stepped(model, optimizer, batch, 10)
    assert mean_loss(model, batches, "token") < before
    twin, its_optimizer = copy.deepcopy((model, optimizer))
    other = copy.deepcopy(model)
    loaded = build_optimizer(other, run)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch shares the tensors
    expected = stepped(model, optimizer, batch, 2)
    assert all(map(torch.equal, expected, stepped(twin, its_optimizer, batch, 2)))
    assert all(map(torch.equal, expected, stepped(other, loaded, batch, 2)))
