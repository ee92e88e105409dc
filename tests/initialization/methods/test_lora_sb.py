"""LoRA-SB against its definition: the exact SVD of one sign step, and that step's size in optimizer steps."""

import pytest
import torch

from lora_one.records.tracking import Tracker
from lora_one.training.arguments import arguments
from lora_one.training.job import TrainingJob
from lora_one.training.schedule import first_step_size, total_steps, warmup_steps
from lora_one.types import LayerView
from tests.helpers.runs import adaptation_for, run_config, start_of

R = 8


def noise(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradient(m, n):
    """A few strong directions over noise, as gradients have; its signs have a long flat tail."""
    return noise(m, n, seed=1) + noise(m, 20, seed=2) * torch.logspace(0, -3, 20) @ noise(20, n, seed=3)


def start(G, *overrides, eta=2e-3):
    layer = LayerView("layer", tuple(G.shape), lambda: None, R, 1.0, torch.Generator().manual_seed(0))
    return start_of(run_config("init.direction=LoRA-SB", f"init.eta={eta}", *overrides).init, layer, G)


def exact(G, eta):
    U, S, Vh = torch.linalg.svd(-eta * torch.sign(G).double(), full_matrices=False)
    return U[:, :R].float(), S[:R].float(), Vh[:R].float()


@pytest.mark.parametrize("eta", [2e-3, 0.5])
def test_product_is_the_best_rank_r_sign_step(eta):
    """B R A = [-eta sign(G)]_r with R = diag(S_r), descending and positive."""
    G = gradient(40, 24)
    factors = start(G, eta=eta)
    U, S, Vh = exact(G, eta)
    torch.testing.assert_close(factors.B @ factors.R @ factors.A, U * S @ Vh, rtol=1e-4, atol=1e-5 * eta)
    torch.testing.assert_close(factors.R, torch.diag(S), rtol=1e-4, atol=1e-6 * eta)
    assert not factors.shift_base


@pytest.mark.parametrize("shape", [(40, 24), (400, 300)])
def test_frozen_factors_are_orthonormal(shape):
    factors = start(gradient(*shape))
    torch.testing.assert_close(factors.B.T @ factors.B, torch.eye(R), rtol=0, atol=1e-5)
    torch.testing.assert_close(factors.A @ factors.A.T, torch.eye(R), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["structured", "noise"])
def test_randomised_svd_captures_the_signs(kind):
    """Where it is not exact (min(m, n) > 256), at the configured tolerance: a matrix of signs decays slowly."""
    G = gradient(400, 300) if kind == "structured" else noise(400, 300, seed=4)
    factors = start(G, eta=1.0)
    U, S, Vh = exact(G, 1.0)
    tail = torch.linalg.svdvals(torch.sign(G))[R:].square().sum()
    missed = (-torch.sign(G) - factors.B @ factors.R @ factors.A).square().sum() - tail
    assert missed <= 1e-3 * S.square().sum()
    torch.testing.assert_close(factors.R.diagonal(), S, rtol=1e-2, atol=0)
    assert torch.linalg.svdvals(U.T @ factors.B).min() > 0.97, "the r-th direction is there too"
    assert torch.linalg.svdvals(Vh @ factors.A.T).min() > 0.97


def test_step_points_downhill_whatever_the_gradient_s_size():
    G = gradient(40, 24)
    factors = start(G)
    assert (factors.B @ factors.R @ factors.A * G).sum() < 0
    other = start(1e-7 * G)
    torch.testing.assert_close(factors.R, other.R)


@pytest.mark.parametrize(
    ("changes", "warmup"),
    [
        (["model.warmup=0.02"], 32),  # ceil(0.02 x 1563 updates of 32 examples), not 334 of 50,000 / 3 micro-batches
        (["model.warmup=0.02", "model.epochs=2"], 63),
        (["model.warmup=100"], 100),
        (["model.warmup=0"], 1),
    ],
)
def test_null_eta_is_the_learning_rate_of_the_first_warmup_step(changes, warmup, tmp_path):
    """lr / warm-up steps, counted in the optimizer's steps, as the Trainer's own schedule reaches it."""
    small = ("model.learning_rate=1e-4", "model.real_batch_size=32", "model.per_device_batch_size=1")
    run = run_config("init.direction=LoRA-SB", *small, *changes)
    assert first_step_size(50_000, run.model) == pytest.approx(1e-4 / warmup)
    steps = total_steps(50_000, run.model)
    trainer = arguments(TrainingJob(run, adaptation_for(run), Tracker(tmp_path / "metrics.jsonl"), tmp_path, 0), 50_000)
    assert warmup_steps(50_000, run.model) == trainer.get_warmup_steps(steps)


def test_scaling_is_one_whatever_alpha():
    for changes in ([], ["peft.lora_alpha=3"], ["peft.use_rslora=false"], ["peft=lora_xs", "peft.lora_alpha=64"]):
        peft = run_config("init.direction=LoRA-SB", *changes).peft
        assert peft.lora_xs and peft.lora_alpha == peft.lora_r and not peft.use_rslora
