"""LoRA-DA (arXiv:2510.24561) as in the authors' code: a gradient step scaled by second moments, and a noise term."""

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from lora_one.config.methods.moments import LoraDASettings
from lora_one.initialization.gradients import zero_gradient
from lora_one.initialization.moments import Moments
from lora_one.linalg import column_signs, orthonormal, truncated_svd
from lora_one.types import AdapterFactors, LayerView

EXACT_BELOW = 1024  # inputs up to which the whole matrix is decomposed
BLOCKS = 24  # products with a block of vectors before the whole matrix is decomposed after all
EXTRA = 8  # vectors of a block beyond the rank


def factors(settings: LoraDASettings, layer: LayerView, moments: Moments) -> AdapterFactors:
    """Return A = V^T / gamma^1/2 and B = Delta V / gamma^1/2, fp32; W is not changed.

    Delta = - D^-1 G C^-1 / sigma, with sigma so that its spectral norm is 1; C and D are damped.
    V (n, r): eigenvectors of the r smallest eigenvalues of
        Omega = - alpha Delta^T Delta + beta tr(D^-1) / (N sigma^2) C^-1
    with alpha = ``da_alpha``, beta = ``da_beta``, N = ``train_examples``. With beta = 0, B A = [Delta]_r / gamma.

    Raises ValueError: the gradient is zero, or C or D is singular in spite of the damping (the layer is named).
    """
    assert settings.train_examples is not None, "a run sets train_examples with settings.completed"
    L = cholesky(layer.name, settings, moments)
    D = moments.outputs + settings.damping
    if not D.all():
        raise ValueError(
            f"layer {layer.name}: the gradient of one of its outputs is zero for every token: set init.damping (now 0) "
            "to a positive number, such as 1e-6"
        )
    step = -torch.cholesky_solve((moments.gradient.to(L) / D[:, None]).T, L).T
    sigma = truncated_svd(step, 1, tolerance=1e-9, generator=layer.generator).S[0]
    if sigma == 0:
        raise zero_gradient(layer.name)
    step /= sigma
    noise = settings.da_beta * D.reciprocal().sum() / (settings.train_examples * sigma**2)

    def omega(block: Tensor) -> Tensor:
        return noise * torch.cholesky_solve(block, L) - settings.da_alpha * (step.T @ (step @ block))

    V = smallest_eigenvectors(omega, L, layer.rank, settings.tolerance, layer.generator)
    root = settings.stable_gamma**0.5
    return AdapterFactors((step @ V / root).float(), (V.T / root).float())


def cholesky(name: str, settings: LoraDASettings, moments: Moments) -> Tensor:
    """Return the lower triangular L (n, n) with L L^T = C + damping I. Raises ValueError: this matrix is singular.

    The damping is at least the size of the rounding errors of C, below which its eigenvalues may be negative.
    """
    C = moments.inputs
    damping = max(settings.damping, 4 * moments.rounding * float(torch.linalg.matrix_norm(C)))
    L, failed = torch.linalg.cholesky_ex(C + damping * torch.eye(len(C), dtype=C.dtype, device=C.device))
    if failed:
        raise ValueError(
            f"layer {name}: the covariance of its {len(C)} inputs is singular, also with init.damping="
            f"{settings.damping:g}: raise init.damping, or use more examples (init.iters)"
        )
    return L


def smallest_eigenvectors(
    product: Callable[[Tensor], Tensor], like: Tensor, rank: int, tolerance: float, generator: Generator
) -> Tensor:
    """Return orthonormal eigenvectors (n, r) of the smallest eigenvalues of a symmetric matrix M, by ``product`` M X.

    In a block Krylov space with Rayleigh-Ritz, until the squared residual of each vector is at most ``tolerance`` times
    its squared eigenvalue, and times the squared spread of all eigenvalues found, which a multiple of the identity does
    not change. If the space becomes large, M is decomposed whole.
    The entry of largest magnitude in each vector is positive.  like: a tensor with n rows and the dtype and device.
    """
    n, width = len(like), rank + EXTRA
    if n > max(EXACT_BELOW, 2 * width):
        block = torch.linalg.qr(torch.randn(n, width, generator=generator).to(like)).Q
        space = images = None
        for _ in range(min(BLOCKS, n // width)):  # no more orthonormal vectors than n
            image = product(block)
            space = block if space is None else torch.cat([space, block], dim=1)
            images = image if images is None else torch.cat([images, image], dim=1)
            values, small = torch.linalg.eigh(space.T @ images)
            spread, values, small = values[-1] - values[0], values[:rank], small[:, :rank]
            residuals = (images @ small - space @ small * values).square().sum(dim=0)
            if bool((residuals <= tolerance * values.abs().clamp(max=spread).square()).all()):
                return (found := space @ small) * column_signs(found)
            block = orthonormal(image, space)[0]
    M = product(torch.eye(n, dtype=like.dtype, device=like.device))
    found = torch.linalg.eigh((M + M.T) / 2).eigenvectors[:, :rank]
    return found * column_signs(found)
