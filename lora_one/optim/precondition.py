"""The r x r preconditioner: multiply a factor's gradient by the inverse Gram matrix of the other factor."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_one.errors import RunError
from lora_one.linalg import exact_dtype, full_precision

LEAST_PIVOT = 1e4  # eps of the smallest pivot relative to its diagonal entry; by tests, 10 eps / pivot is the error
LEAST_DAMPING = 1e-30  # for a zero factor and lambda = 0; the gradient of the other factor is zero and stays zero


class Half(NamedTuple):
    """One factor of a pair, whose gradient is preconditioned by the Gram matrix of its partner."""

    layer: str
    factor: nn.Parameter  # A (r, n), or B (m, r)
    partner: nn.Parameter  # B (m, r), or A (r, n)
    is_A: bool

    @property
    def partner_name(self) -> str:
        return f"lora_{'B' if self.is_A else 'A'} of {self.layer}"

    def gram(self, dtype: torch.dtype) -> Tensor:
        """Return B^T B for A's gradient, A A^T for B's: (r, r)."""
        partner = widened(self.partner, dtype)
        return partner.mT @ partner if self.is_A else partner @ partner.mT

    def apply(self, inverse: Tensor) -> None:
        """Set g_A <- P g_A or g_B <- g_B P, computed in P's dtype."""
        grad = self.factor.grad
        wide = widened(grad, inverse.dtype)
        grad.copy_(inverse @ wide if self.is_A else wide @ inverse)


def widened(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor in a wider dtype."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)  # a `to` without effect costs a tenth of a small step


@torch.no_grad()
def precondition(halves: Sequence[Half], reg: float, *, relative: bool) -> None:
    """Set g_A <- (B^T B + lambda I)^-1 g_A and g_B <- g_B (A A^T + lambda I)^-1, in place in ``grad``.

    Source: arXiv:2402.02347, eq. 9 of arXiv:2502.01235.  halves: of one rank, dtype and device, with gradients.
    reg: lambda; with ``relative``, lambda divided by the mean diagonal entry of the Gram matrix.  Products are fp32, or
    fp64 for fp64 factors and for Gram matrices that need it (`inverses_of`). All systems are solved in one batch, with
    one host synchronisation.
    """
    device = halves[0].factor.device
    dtype = torch.promote_types(halves[0].factor.dtype, torch.float32)
    with full_precision(device):
        if in_stacks(device):
            precondition_in_stacks(halves, reg, dtype, relative=relative)
            return
        grams = torch.stack([half.gram(dtype) for half in halves])
        for half, inverse in zip(halves, inverses_of(halves, grams, reg, relative=relative).unbind(), strict=True):
            half.apply(inverse)


def in_stacks(device: torch.device) -> bool:
    """Return whether factors of one shape are stacked and multiplied as one batch.

    On a GPU, launching hundreds of small products takes most of a step; on a CPU the copies cost more than they save.
    """
    return device.type == "cuda"


def precondition_in_stacks(halves: Sequence[Half], reg: float, dtype: torch.dtype, *, relative: bool) -> None:
    """Do the same as `precondition` with a few batched products for all halves of one shape."""
    alike: dict[tuple, list[Half]] = {}
    for half in halves:
        alike.setdefault((half.is_A, half.factor.shape, half.partner.shape), []).append(half)
    groups = list(alike.values())
    grams = torch.cat([stacked_grams(group, dtype) for group in groups])
    inverses = inverses_of([half for group in groups for half in group], grams, reg, relative=relative)
    for group, inverse in zip(groups, inverses.split([len(group) for group in groups]), strict=True):
        gradients = [half.factor.grad for half in group]
        wide = widened(torch.stack(gradients), dtype)
        torch._foreach_copy_(gradients, list((inverse @ wide if group[0].is_A else wide @ inverse).unbind()))


def stacked_grams(group: Sequence[Half], dtype: torch.dtype) -> Tensor:
    """Return the Gram matrices (k, r, r) of k halves of one shape, by one batched product."""
    partners = widened(torch.stack([half.partner for half in group]), dtype)
    return partners.mT @ partners if group[0].is_A else partners @ partners.mT


def inverses_of(halves: Sequence[Half], grams: Tensor, reg: float, *, relative: bool) -> Tensor:
    """Return (K + lambda I)^-1 of each half's Gram matrix K (k, r, r), to about 1e-3, overwriting ``grams``.

    A pivot of the Cholesky decomposition of K + lambda I has an error of some eps times its diagonal entry. If it is
    itself not much larger, the step in that direction would become thousands of times too large or too small, so such a
    K is computed again in fp64. reg, relative: see `precondition`. Raises RunError: K is not finite.
    """
    damp(grams, reg, relative=relative)
    triangles, failures = torch.linalg.cholesky_ex(grams)
    exact = (failures == 0) & (least_pivots(triangles, grams) > LEAST_PIVOT * torch.finfo(grams.dtype).eps)
    found = inverses(triangles)
    if not exact.all():
        others = [place for place, is_exact in enumerate(exact.tolist()) if not is_exact]
        wider = torch.stack([halves[place].gram(exact_dtype(grams.device)) for place in others])
        names = [halves[place].partner_name for place in others]
        found[others] = damped_inverses(wider, reg, names, grams.dtype, relative=relative)
    return found


def damped_inverses(
    grams: Tensor, reg: float, names: Sequence[str], dtype: torch.dtype, *, relative: bool = False
) -> Tensor:
    """Return (K + lambda I)^-1 of each Gram matrix K (k, r, r) in dtype, overwriting ``grams``; reg: as `precondition`.

    If the Cholesky decomposition of K + lambda I fails, or its smallest pivot is below eps of dtype, lambda is
    increased by sqrt(eps of dtype) times K's mean diagonal, and a warning names the matrix: otherwise the rounding of a
    gradient, divided by that pivot, could be larger than the step. Raises RunError: K is not finite.
    """
    sizes = damp(grams, reg, relative=relative)
    triangles, failures = torch.linalg.cholesky_ex(grams)
    regular = (failures == 0) & (least_pivots(triangles, grams) > torch.finfo(dtype).eps)
    if not regular.all():
        failed = (~regular).nonzero().flatten()
        those = names[int(failed[0])] + (f" and {len(failed) - 1} more" if len(failed) > 1 else "")
        share = torch.finfo(dtype).eps ** 0.5
        extra = torch.diag_embed((share * sizes[failed]).expand(-1, grams.shape[-1]))
        triangles[failed], failures = torch.linalg.cholesky_ex(grams[failed] + extra)
        if failures.any():
            raise RunError(f"the Gram matrix of {those} is not finite: training has diverged; lower the learning rate")
        warnings.warn(
            f"the Gram matrix of {those} is singular in {dtype} with lambda = {reg:g}: for this step, "
            f"{share:.0e} times its mean diagonal is added to lambda; to avoid this, raise lambda (model.prec_reg, or "
            "the argument reg)",
            stacklevel=2,
        )
    return inverses(triangles).to(dtype)


def damp(grams: Tensor, reg: float, *, relative: bool) -> Tensor:
    """Add lambda I to Gram matrices (k, r, r) in place; return the mean diagonal entry of each before that: (k, 1)."""
    diagonals = grams.diagonal(dim1=-2, dim2=-1)
    sizes = diagonals.mean(-1, keepdim=True)
    diagonals += (reg * sizes if relative else reg) + LEAST_DAMPING
    return sizes


def least_pivots(triangles: Tensor, grams: Tensor) -> Tensor:
    """Return the smallest pivot L_ii^2 of each Cholesky factor, relative to the diagonal entry of its matrix: (k,)."""
    return (triangles.diagonal(dim1=-2, dim2=-1).square() / grams.diagonal(dim1=-2, dim2=-1)).amin(-1)


def inverses(triangles: Tensor) -> Tensor:
    """Return (L L^T)^-1 of Cholesky factors L (k, r, r)."""
    identity = torch.eye(triangles.shape[-1], dtype=triangles.dtype, device=triangles.device)
    roots = torch.linalg.solve_triangular(triangles, identity, upper=False)
    return roots.mT @ roots
