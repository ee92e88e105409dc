"""The linear toy problem: noise-free Y = X (W + D)^T with Gaussian X, loss ||X (B A - D)^T||^2 / (2 N).

Published (the authors' notebook of 2025): 100 inputs and outputs, D of rank 4, adapters of rank 8, N = 1,600. W cancels
in the loss, so it is not drawn. The notebook computes in fp32, this in fp64.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Generator, Tensor

SIZE, RANK, TRUE_RANK, SAMPLES = 100, 8, 4, 1600


@dataclass(frozen=True)
class LinearProblem:
    """delta: D (m, n).  covariance: X^T X / N (n, n).  generator: for further draws of the experiment."""

    delta: Tensor
    covariance: Tensor
    generator: Generator

    @classmethod
    def drawn(cls, singular: Sequence[float], seed: int) -> Self:
        """Return a problem whose D has these singular values and the singular vectors of a Gaussian matrix."""
        generator = torch.Generator().manual_seed(seed)
        delta = matrix_with(singular, SIZE, generator)
        X = torch.randn(SAMPLES, SIZE, generator=generator, dtype=torch.float64)
        return cls(delta, X.T @ X / SAMPLES, generator)

    def gradient(self) -> Tensor:
        """Return G = dL/dW at B A = 0, (m, n): -D X^T X / N."""
        return -self.delta @ self.covariance

    def shifted(self, product: Tensor) -> Self:
        """Return the problem after W became W - B A: D + B A is left to learn."""
        return replace(self, delta=self.delta + product)

    def loss(self, product: Tensor) -> Tensor:
        """Return ||X (B A - D)^T||^2 / (2 N)."""
        error = product - self.delta
        return (error @ self.covariance * error).sum() / 2

    def log_risk(self, product: Tensor) -> float:
        """Return ln(||B A - D||_F^2 / 2), minus infinity at 0."""
        risk = (product.detach() - self.delta).square().sum().item() / 2
        return math.log(risk) if risk > 0 else -math.inf


def matrix_with(singular: Sequence[float], size: int, generator: Generator) -> Tensor:
    """Return a (size, size) matrix with these singular values and the leading singular vectors of a Gaussian matrix."""
    U, _, Vh = torch.linalg.svd(torch.randn(size, size, generator=generator, dtype=torch.float64))
    count = len(singular)
    return U[:, :count] * torch.tensor(singular, dtype=torch.float64) @ Vh[:count]
