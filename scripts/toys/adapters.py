"""Adapters of one layer, started by the project's own methods and trained by its own optimizers.

Symbols as in lora_one/types.py, with s = 1: W_eff = W + B A, B (m, r), A (r, n). The papers write x^T (W + A B), so
their A is the transpose of B here, and the reverse. All tensors are fp64.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from lora_one.config.defaults import defaults_of
from lora_one.config.methods import METHODS
from lora_one.initialization.low_rank_step import StepSettings, factorised
from lora_one.initialization.methods import build_init
from lora_one.optim import create_scaled_optimizer
from lora_one.seeding import generator_for
from lora_one.types import AdapterFactors, LayerView


class Adapter(nn.Module):
    """The factors of one layer, named as in PEFT so that the project's optimizers find them.

    With a core R, B and A are frozen and only R is trained.
    """

    def __init__(self, factors: AdapterFactors):
        super().__init__()
        (m, r), n = factors.B.shape, factors.A.shape[1]
        self.R = None if factors.R is None else nn.Parameter(factors.R.clone())
        self.lora_A = nn.ModuleDict({"default": nn.Linear(n, r, bias=False, dtype=torch.float64)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(r, m, bias=False, dtype=torch.float64)})
        for factor, value in ((self.A, factors.A), (self.B, factors.B)):
            factor.data = value.to(torch.float64).clone()
            factor.requires_grad_(self.R is None)

    @property
    def A(self) -> nn.Parameter:
        return self.lora_A["default"].weight

    @property
    def B(self) -> nn.Parameter:
        return self.lora_B["default"].weight

    def product(self) -> Tensor:
        """Return B A, or B R A, (m, n)."""
        return self.B @ self.A if self.R is None else self.B @ self.R @ self.A


def start(choice: str, gradient: Tensor, rank: int, **changes: Any) -> AdapterFactors:
    """Return the factors that a method computes from one layer's gradient G (m, n), with s = 1.

    choice: a file of conf/init/.  changes: keys of that file with other values.  The seed is 0 unless it is changed.
    """
    keys = defaults_of(choice) | {"seed": 0} | changes
    settings = METHODS[keys["method"]](**keys).resolved()
    settings.check_values()
    settings.check()
    step = factorised(choice, gradient, StepSettings(singular=settings.vectors * rank, seed=settings.seed))
    generator = generator_for(settings.seed, choice)
    layer = LayerView(choice, tuple(gradient.shape), lambda: torch.zeros(gradient.shape), rank, 1.0, generator)
    return build_init(settings).factors(layer, step)


def spectral(gradient: Tensor, rank: int, gamma: float = 1.0) -> AdapterFactors:
    """Return the paper's Spectral-init, B A = gamma [-G]_r, as LoRA-One without the division by S_1.

    The project divides by its gamma, so its value is 1 / gamma.
    """
    return start("lora_one", gradient, rank, normalize="none", scale="stable", stable_gamma=1 / gamma)


def descent(adapter: Adapter, rate: float, damping: float | None = None) -> Optimizer:
    """Return gradient descent; with a damping lambda, preconditioned as in eq. 9 of arXiv:2502.01235."""
    trained = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
    if damping is None:
        return SGD(trained, lr=rate)
    return create_scaled_optimizer(nn.ModuleList([adapter]), SGD, lr=rate, reg=damping)


def descend(
    adapter: Adapter, loss: Callable[[Tensor], Tensor], optimizer: Optimizer, steps: int
) -> Iterator[tuple[int, float]]:
    """Take the steps; yield (step, loss of the product) before each step and after the last."""
    for step in range(steps + 1):
        optimizer.zero_grad()
        value = loss(adapter.product())
        yield step, value.item()
        if step < steps:
            value.backward()
            optimizer.step()
