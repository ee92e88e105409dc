"""The linear toy problem: preconditioned descent from the spectral start, whatever the condition number."""

import math

import pytest
import torch
from torch import nn

from lora_one.optim import create_scaled_optimizer
from tests.helpers.models import FactorLayer

D, RANK, SAMPLES = 100, 8, 1600  # of x and y; of the adapter; of (x, y)


class Problem:
    """Y = X (W + D)^T with D (100, 100) of the given singular values; loss ||X (B A - D)^T||^2 / (2 N), fp64."""

    def __init__(self, singular):
        generator = torch.Generator().manual_seed(0)
        U, _, Vh = torch.linalg.svd(torch.randn(D, D, generator=generator, dtype=torch.float64))
        k = len(singular)
        self.delta = U[:, :k] * torch.tensor(singular, dtype=torch.float64) @ Vh[:k]
        X = torch.randn(SAMPLES, D, generator=generator, dtype=torch.float64)
        self.covariance = X.T @ X / SAMPLES

    def spectral(self, rank):
        """B = U_r S_r^1/2, A = S_r^1/2 V_r^T of the negative gradient at the pretrained point."""
        U, S, Vh = torch.linalg.svd(self.delta @ self.covariance)
        return FactorLayer(U[:, :rank] * S[:rank].sqrt(), S[:rank].sqrt()[:, None] * Vh[:rank])

    def loss(self, layer):
        error = layer.B @ layer.A - self.delta
        return (error @ self.covariance * error).sum() / 2

    def risk(self, layer):
        return (layer.B @ layer.A - self.delta).square().sum().item() / 2

    def descend(self, layer, optimizer, steps, until=0.0):
        """Steps taken until the risk is that small, at most ``steps``."""
        for step in range(steps):
            if self.risk(layer) <= until:
                return step
            optimizer.zero_grad()
            self.loss(layer).backward()
            optimizer.step()
        return steps


def scaled_gd(layer, reg=1e-3):
    return create_scaled_optimizer(nn.ModuleList([layer]), torch.optim.SGD, lr=0.5, reg=reg)


def test_reaches_the_floor_of_fp64_in_a_hundred_steps():
    """Spectral start, eta = 0.5, lambda = 1e-3; ln risk begins near -2.9 and falls linearly."""
    problem = Problem([1.0, 0.75, 0.5, 0.25])
    layer = problem.spectral(RANK)
    assert math.log(problem.risk(layer)) == pytest.approx(-2.9, abs=0.3)
    optimizer = scaled_gd(layer)
    halfway = problem.descend(layer, optimizer, 50) and math.log(problem.risk(layer))
    problem.descend(layer, optimizer, 50)
    assert math.log(problem.risk(layer)) <= -60 < halfway < -25


@pytest.mark.parametrize("rank", [4, RANK])
def test_convergence_does_not_depend_on_the_condition_number(rank):
    """Steps to a risk of 1e-8, the rank known or not; both with eta = 0.5."""
    scaled, plain = {}, {}
    for kappa in (1, 10, 100):
        problem = Problem([kappa ** (-i / 3) for i in range(4)])
        layer = problem.spectral(rank)
        scaled[kappa] = problem.descend(layer, scaled_gd(layer), 1000, until=1e-8)
        layer = problem.spectral(rank)
        descent = torch.optim.SGD(layer.parameters(), lr=0.5)
        plain[kappa] = problem.descend(layer, descent, 20_000, until=1e-8)
    assert max(scaled.values()) < 1.5 * min(scaled.values()) < 100
    assert plain[10] > 2 * plain[1] and plain[100] > 5 * plain[10]
    assert plain[100] < 20_000, "it gets there, late"
