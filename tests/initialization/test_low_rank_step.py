"""Every way of holding gradients gives the steps of autograd's full-weight gradient, in the memory it promises."""

import pytest
import torch

from lora_one.data.encode import batches_of
from lora_one.errors import RunError
from lora_one.initialization import low_rank_step as steps
from lora_one.initialization.low_rank_step import StepSettings, low_rank_steps
from lora_one.initialization.methods import build_init
from lora_one.initialization.solution import Probe
from lora_one.initialization.start import attach_adapters
from tests.helpers.examples import RANK, assert_same, autograd, examples, linear_layers
from tests.helpers.models import Experts, random_llama, wide_llama
from tests.helpers.runs import adaptation_for, run_config


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("memory", "batch_size", "hold"),
    [
        ("fast", 5, "device"),
        ("auto", 5, "layer"),
        ("low", 5, "layer"),
        ("fast", 2, "device"),
        ("auto", 2, "device"),
        ("low", 2, "sketch"),
        ("low", 1, "sketch"),
    ],
)
def test_same_steps_as_the_exact_svd_of_autograds_gradient(memory, batch_size, hold, checkpointing):
    model = wide_llama()
    layers, batches = linear_layers(model), batches_of(examples(), batch_size, 0)
    expected = {n: torch.linalg.svd(G, full_matrices=False) for n, G in autograd(model, layers, batches).items()}
    settings = StepSettings(singular=RANK, tolerance=1e-8, memory=memory, checkpointing=checkpointing)
    found = {}
    report = low_rank_steps(model, layers, batches, "example", settings, found.__setitem__)
    assert (report.examples, report.memory) == (5, hold)
    products = {name: step.U * step.S @ step.Vh for name, step in found.items()}
    exact = {name: U[:, :RANK] * S[:RANK] @ Vh[:RANK] for name, (U, S, Vh) in expected.items()}
    assert_same(products, exact, 1e-5)
    for name, step in found.items():
        S = expected[name][1]
        energy = float(S[:RANK].square().sum() / S.square().sum())
        outside = float(S[2 * (RANK + 8) :].square().sum() / S.square().sum())  # what the sketch can only estimate
        assert step.energy == pytest.approx(energy, rel=1e-4 + outside), name
        torch.testing.assert_close(step.S, S[:RANK], rtol=1e-4, atol=0)


@pytest.mark.parametrize("singular", [RANK, 2 * RANK])
def test_every_memory_mode_gives_the_same_product(singular):
    """U diag(S) Vh to 1e-5 of its norm at the default tolerance, above and below the size of the exact SVD."""
    model = random_llama(hidden_size=320, intermediate_size=400)  # k_proj and v_proj are (160, 320)
    layers = linear_layers(model)
    products = {}
    for memory, batch_size in (("fast", 2), ("low", 2), ("low", 5)):
        batches, settings = batches_of(examples(), batch_size, 0), StepSettings(singular=singular, memory=memory)
        found = {}
        hold = low_rank_steps(model, layers, batches, "example", settings, found.__setitem__).memory
        products[hold] = {name: step.U * step.S @ step.Vh for name, step in found.items()}
    assert products.keys() == {"device", "sketch", "layer"}
    assert_same(products["sketch"], products["device"])
    assert_same(products["layer"], products["device"])


@pytest.mark.parametrize(("memory", "batch_size"), [("fast", 2), ("low", 5), ("low", 2)])
def test_low_rank_steps_are_taken_outside_of_autocast(memory, batch_size):
    model = random_llama()
    layers, batches = linear_layers(model), batches_of(examples(), batch_size, 0)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            steps_found = {}
            settings = StepSettings(singular=RANK, memory=memory)
            low_rank_steps(model, layers, batches, "example", settings, steps_found.__setitem__)
            found.append(steps_found)
    outside, inside = found
    assert all(
        torch.equal(step.U, inside[name].U) and torch.equal(step.S, inside[name].S) for name, step in outside.items()
    )


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("batch_size", [2, 5])
def test_gradient_that_is_zero_or_not_finite_is_named(memory, batch_size):
    model = Experts(used=(0, 1))
    model.head.weight.zero_()
    layers, batches = {"first": model.experts[0]}, batches_of(examples(vocabulary=64), batch_size, 0)
    settings = StepSettings(singular=RANK, memory=memory)
    with pytest.raises(ValueError, match="the gradient of layer first is zero"):
        low_rank_steps(model, layers, batches, "example", settings, lambda n, step: None)
    model = Experts(used=(0, 1))
    model.words.weight.mul_(1e30)  # tanh keeps the loss finite
    model.experts[0].weight.mul_(1e-30)
    model.head.weight.mul_(1e10)
    layers = {"first": model.experts[0]}
    with pytest.raises(ValueError, match=r"layer first\b.* not finite"):
        low_rank_steps(model, layers, batches, "example", settings, lambda n, step: None)


def test_errors_reach_the_user_as_run_errors(monkeypatch):
    monkeypatch.setattr(steps, "factorised", lambda *_: (_ for _ in ()).throw(ValueError("layer x: why")))
    run = run_config()
    probe = Probe(batches_of(examples(), 2, 0), "example")
    with pytest.raises(RunError, match="init: layer x: why"):
        attach_adapters(random_llama(), adaptation_for(run), build_init(run.init), probe, seed=0)
