"""What every conf/init must keep."""

import pytest
import torch
from conftest import ROOT, run_config, start_of

from lora_one.inits import build_init
from lora_one.types import LayerView

CHOICES = sorted(path.stem for path in (ROOT / "conf/init").glob("[!_]*.yaml"))


@pytest.fixture
def view():
    weight = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
    return lambda: LayerView("layer", (12, 8), lambda: weight, 3, 4.0, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("choice", CHOICES)
def test_every_init_keeps_the_contract(choice, view):
    init = run_config(f"init={choice}").init
    gradient = torch.randn(12, 8, generator=torch.Generator().manual_seed(2))
    factors, again = start_of(init, view(), gradient), start_of(init, view(), gradient)
    assert factors.B.shape == (12, 3) and factors.A.shape == (3, 8)
    assert factors.B.dtype == factors.A.dtype == torch.float32
    assert torch.isfinite(factors.B @ factors.A).all()
    assert torch.equal(factors.B, again.B) and torch.equal(factors.A, again.A), "same generator, same factors"


def test_lora_starts_at_the_pretrained_function(view):
    """A uniform in +-1/sqrt(n) (Kaiming with a = sqrt 5), B zero."""
    factors = build_init(run_config("init=default").init).factors(view(), None)
    assert not factors.B.any()
    assert factors.A.abs().max() <= 8**-0.5 and factors.A.std() == pytest.approx((1 / 3 / 8) ** 0.5, rel=0.3)


def test_gaussian_has_its_standard_deviation():
    method = build_init(run_config("init=gaussian", "init.lora_A_std=0.5").init)
    wide = LayerView("layer", (12, 4000), lambda: None, 3, 4.0, torch.Generator().manual_seed(0))
    factors = method.factors(wide, None)
    assert factors.A.std() == pytest.approx(0.5, rel=0.03) and not factors.B.any()
