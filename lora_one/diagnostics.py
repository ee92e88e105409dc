"""Diagnostics of an adapter: norms, leading singular values, principal angles to the gradient's subspace."""

import math
from collections.abc import Iterator, Mapping
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from lora_one.types import AdapterFactors

LEADING = 8  # singular values that are reported
Vectors = tuple[Tensor, Tensor]  # U_r (m, r) and Vh_r (r, n), orthonormal


def layer_diagnostics(factors: AdapterFactors, gradient: Vectors | None = None) -> dict[str, Any]:
    """Return Frobenius norm and leading singular values of B, A and B A (with a core: B R A), without the scaling s.

    With B = Q_B R_B and A^T = Q_A R_A, the singular values of B A are those of the r x r matrix R_B R_A^T; no m x n
    matrix is formed.
    gradient: its leading singular vectors; adds the principal angles, in degrees and ascending, between the columns of
    B and of U_r (``B_angles``), and between the rows of A and of Vh_r (``A_angles``).  There are fewer than r angles if
    B or A has a lower rank.

    Computed in fp32 on the CPU.  Empty if a factor is not finite.
    """
    B, A, R = (None if part is None else part.float().cpu() for part in (factors.B, factors.A, factors.R))
    if not all(torch.isfinite(part).all() for part in (B, A, R) if part is not None):
        return {}
    (Q_B, R_B), (Q_A, R_A) = torch.linalg.qr(B), torch.linalg.qr(A.T)
    core = R_B @ R_A.T if R is None else R_B @ R @ R_A.T
    found: dict[str, Any] = {}
    for name, small in (("B", R_B), ("A", R_A), ("BA", core)):
        found[f"{name}_norm"] = float(small.norm())
        found[f"{name}_singular"] = torch.linalg.svdvals(small)[:LEADING].tolist()
    if gradient is not None:
        for name, Q, small, vectors in (("B", Q_B, R_B, gradient[0]), ("A", Q_A, R_A, gradient[1].T)):
            found[f"{name}_angles"] = principal_angles(Q @ column_space(small), vectors.float().cpu()).tolist()
    return found


def column_space(matrix: Tensor) -> Tensor:
    """Return an orthonormal basis of the column space; its number of columns is the matrix's numerical rank."""
    U, S, _ = torch.linalg.svd(matrix, full_matrices=False)
    rank = int((S / S[0] > max(matrix.shape) * torch.finfo(S.dtype).eps).sum())  # 0 / 0 is not greater
    return U[:, :rank]


def principal_angles(P: Tensor, Q: Tensor) -> Tensor:
    """Return the min(k, l) principal angles between two orthonormal bases (m, k) and (m, l), in degrees, ascending.

    The cosines are the singular values of Q^T P, the sines those of P - Q Q^T P; with both, small angles are as
    accurate as large ones (Bjorck and Golub, Math. Comp. 27, 1973).
    """
    if P.shape[1] > Q.shape[1]:
        P, Q = Q, P
    shared = Q.T @ P
    cosines = torch.linalg.svdvals(shared)
    sines = torch.linalg.svdvals(P - Q @ shared).flip(0)
    return torch.rad2deg(torch.atan2(sines, cosines))


def by_kind(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return means over layers of one kind (last part of the name) as ``<kind>/<quantity>``, if all are finite."""
    values: dict[str, list[float]] = {}
    for layer, found in layers.items():
        for quantity, value in scalars(found):
            values.setdefault(f"{layer.rpartition('.')[2]}/{quantity}", []).append(value)
    return {name: mean(each) for name, each in values.items() if all(map(math.isfinite, each))}


def scalars(found: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield a layer's numbers: ``BA_norm``, ``BA_sigma_1``, ..., and with angles ``B_angle_max``, ``B_angle_mean``."""
    for name, value in found.items():
        matrix, _, what = name.partition("_")
        if what == "norm":
            yield name, value
        elif what == "singular":
            yield from ((f"{matrix}_sigma_{place}", sigma) for place, sigma in enumerate(value, start=1))
        elif value:
            yield f"{matrix}_angle_max", value[-1]
            yield f"{matrix}_angle_mean", mean(value)
