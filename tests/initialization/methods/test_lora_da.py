"""LoRA-DA against its definition, written out with explicit inverses and a whole eigendecomposition in fp64."""

import dataclasses

import pytest
import torch

from lora_one.initialization.methods.lora_da import factors, smallest_eigenvectors
from lora_one.initialization.moments import Moments
from lora_one.types import LayerView
from tests.helpers.runs import run_config, start_of

M, N, R, S = 20, 30, 4, 2.0


def noise(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def settings(**changes):
    plain = run_config("init=lora_da").init
    return dataclasses.replace(plain, train_examples=1000, **changes)


def layer(shape=(M, N)):
    return LayerView("some.layer", shape, lambda: None, R, S, torch.Generator().manual_seed(0))


@pytest.fixture
def moments():
    X, E = noise(200, N, seed=1) * torch.logspace(0, -1, N, dtype=torch.float64), noise(200, M, seed=2)
    E = (E + X[:, :3] @ noise(3, M, seed=3)) * torch.logspace(0, -1, M, dtype=torch.float64)
    return Moments(E.T @ X / 200, X.T @ X / 200, E.square().mean(dim=0), 0.0)


def written_out(moments, alpha, beta, gamma, damping, examples):
    G, C, D = moments.gradient, moments.inputs, moments.outputs
    Cinv = torch.linalg.inv(C + damping * torch.eye(N, dtype=torch.float64))
    Dinv = torch.diag(1 / (D + damping))
    delta = -Dinv @ G @ Cinv
    sigma = torch.linalg.svdvals(delta)[0]
    delta = delta / sigma
    omega = -alpha * delta.T @ delta + beta * torch.trace(Dinv) / (examples * sigma**2) * Cinv
    V = torch.linalg.eigh(omega).eigenvectors[:, :R]
    return delta @ V / gamma**0.5, V.T / gamma**0.5


@pytest.mark.parametrize("beta", [0.03, 3.0, 300.0])  # from no influence on the subspace to a large one
def test_product_is_that_of_the_definition(moments, beta):
    found = factors(settings(da_beta=beta, damping=1e-2), layer(), moments)
    B, A = written_out(moments, 1.0, beta, 1024.0, 1e-2, 1000)
    torch.testing.assert_close((found.B @ found.A).double(), B @ A, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close((found.A.T @ found.A).double(), A.T @ A, rtol=1e-4, atol=1e-8)
    assert not found.shift_base


def test_noise_changes_the_subspace(moments):
    """Otherwise the test above could not see an error in the noise."""
    few, many = (factors(settings(da_beta=beta, damping=1e-2), layer(), moments).A for beta in (0.0, 300.0))
    overlap = torch.linalg.svdvals(1024 * few @ many.T)
    assert overlap.min() < 0.9


def test_rows_of_a_are_orthonormal_up_to_gamma(moments):
    found = factors(settings(stable_gamma=64.0), layer(), moments)
    torch.testing.assert_close(found.A @ found.A.T, torch.eye(R) / 64, rtol=1e-5, atol=1e-7)


def test_without_noise_it_is_the_best_rank_r_approximation_of_the_scaled_step(moments):
    found = factors(settings(da_beta=0.0), layer(), moments)
    delta = -(moments.gradient / (moments.outputs + 1e-6)[:, None]) @ torch.linalg.inv(
        moments.inputs + 1e-6 * torch.eye(N, dtype=torch.float64)
    )
    U, s, Vh = torch.linalg.svd(delta / torch.linalg.matrix_norm(delta, 2))
    torch.testing.assert_close((found.B @ found.A).double(), U[:, :R] * s[:R] @ Vh[:R] / 1024, rtol=1e-4, atol=1e-9)
    assert torch.linalg.svdvals(S * found.B @ found.A)[0] == pytest.approx(S / 1024, rel=1e-5)


def test_with_white_moments_and_without_noise_it_is_lora_one(moments):
    white = Moments(moments.gradient, 3 * torch.eye(N, dtype=torch.float64), torch.full((M,), 0.5).double(), 0.0)
    found = factors(settings(da_beta=0.0), layer(), white)
    one = start_of(run_config("init=lora_one", "init.stable_gamma=1024").init, layer(), moments.gradient.float())
    torch.testing.assert_close(found.B @ found.A, one.B @ one.A, rtol=1e-4, atol=1e-8)


def test_scale_of_the_loss_does_not_matter_without_damping(moments):
    scaled = Moments(1e3 * moments.gradient, moments.inputs, 1e6 * moments.outputs, 0.0)
    one, other = (factors(settings(damping=0.0), layer(), given) for given in (moments, scaled))
    torch.testing.assert_close(one.B @ one.A, other.B @ other.A, rtol=1e-4, atol=1e-9)


def test_singular_covariance_is_one_message(moments):
    few = Moments(moments.gradient, torch.ones(N, N, dtype=torch.float64), moments.outputs, 0.0)
    with pytest.raises(
        ValueError, match=r"layer some\.layer: the covariance of its 30 inputs is singular.*init.damping"
    ):
        factors(settings(damping=0.0), layer(), few)
    silent = Moments(moments.gradient, moments.inputs, torch.zeros(M, dtype=torch.float64), 0.0)
    with pytest.raises(ValueError, match=r"layer some\.layer: the gradient of one of its outputs is zero"):
        factors(settings(damping=0.0), layer(), silent)
    nothing = Moments(torch.zeros(M, N), moments.inputs, moments.outputs, 0.0)
    with pytest.raises(ValueError, match=r"the gradient of layer some\.layer is zero"):
        factors(settings(), layer(), nothing)


def test_rounding_errors_of_the_covariance_are_damped(moments):
    """In fp32 a covariance has eigenvalues below zero, of the size of its rounding errors."""
    X = noise(10, N, seed=4)
    C = X.T @ X * 1e3 - 1e-3 * torch.eye(N, dtype=torch.float64)
    rounded = Moments(moments.gradient, C, moments.outputs, 1.2e-7)
    assert torch.isfinite(factors(settings(), layer(), rounded).B).all()
    with pytest.raises(ValueError, match="singular"):
        factors(settings(), layer(), dataclasses.replace(rounded, rounding=0.0))


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_eigenvectors_of_a_large_matrix(decay):
    """By products alone where the eigenvalues decay, by the whole matrix where they do not: the same subspace."""
    n, products = 1100, []
    half = noise(n, 60, seed=5) * torch.arange(1, 61, dtype=torch.float64) ** -decay
    M = 1e-3 * torch.diag(torch.linspace(0, 1, n, dtype=torch.float64)) - half @ half.T / n

    def product(block):
        products.append(block.shape[1])
        return M @ block

    V = smallest_eigenvectors(product, M, R, 1e-8, torch.Generator().manual_seed(0))
    expected = torch.linalg.eigh(M)
    torch.testing.assert_close(V.T @ V, torch.eye(R, dtype=torch.float64), rtol=0, atol=1e-10)
    assert float((V.T @ M @ V).trace()) == pytest.approx(float(expected.eigenvalues[:R].sum()), rel=1e-6)
    assert max(products) < n or decay == 0.0


def test_no_more_vectors_than_the_matrix_has():
    """A space of all vectors cannot grow: what follows would be rounding errors."""
    n, rank, widths = 1100, 200, []
    M = torch.diag(torch.linspace(-1, 1, n, dtype=torch.float64))

    def product(block):
        widths.append(block.shape[1])
        return M @ block

    V = smallest_eigenvectors(product, M, rank, 0.0, torch.Generator().manual_seed(0))
    assert sum(widths[:-1]) <= n and widths[-1] == n
    torch.testing.assert_close(V, torch.eye(n, rank, dtype=torch.float64), rtol=0, atol=1e-10)


def test_a_multiple_of_the_identity_changes_no_eigenvector():
    """Relative to a large eigenvalue, the residual of any vector is small."""
    n = 1100
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(n, 20, generator=generator, dtype=torch.float64) / n**0.5
    M = -low * torch.logspace(0, -1, 20, dtype=torch.float64) @ low.T
    shifted = 5 * torch.eye(n, dtype=torch.float64) + M
    V = smallest_eigenvectors(shifted.matmul, shifted, R, 1e-3, generator)
    best = float(torch.linalg.eigvalsh(M)[:R].sum())
    assert float((V.T @ M @ V).trace()) == pytest.approx(best, rel=1e-2)
