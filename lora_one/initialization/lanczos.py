"""Lanczos' method: the largest eigenvalue of a matrix of which only products are computed."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Eigenvalue(NamedTuple):
    """An eigenvalue and how well it is known.

    error: bound on the distance to an eigenvalue.  products: of the matrix with a vector.  converged: the error is
    within the tolerance; False: the limit of products ended the search, and larger eigenvalues may exist.
    """

    value: float
    error: float
    products: int
    converged: bool


def largest_eigenvalue(
    product: Callable[[Tensor], Tensor], start: Tensor, *, tolerance: float, limit: int
) -> Eigenvalue:
    """Return the largest eigenvalue of a symmetric matrix M that is accessed through products M v.

    Lanczos' method with full orthogonalisation. It ends when the residual of the Ritz vector, which bounds the distance
    to an eigenvalue, is at most ``tolerance`` x the eigenvalue, and after ``limit`` products.

    start: (n,), any direction that is not orthogonal to the eigenvector.
    Raises ValueError: a product is not finite.
    """
    basis = [start / start.norm()]
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        image = product(basis[-1])
        if not torch.isfinite(image).all():
            raise ValueError("a product with the matrix is not finite")
        diagonal.append(float(basis[-1] @ image))
        for _ in range(2):
            for vector in basis:
                image = image - vector * (vector @ image)
        left = float(image.norm())
        T = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        for place, value in enumerate(beside):
            T[place, place + 1] = T[place + 1, place] = value
        values, vectors = torch.linalg.eigh(T)
        largest, residual = float(values[-1]), left * abs(float(vectors[-1, -1]))
        converged = residual <= tolerance * abs(largest) or len(basis) == len(start)
        if converged or len(basis) >= limit:
            return Eigenvalue(largest, residual, len(basis), converged)
        beside.append(left)
        basis.append(image / left)
