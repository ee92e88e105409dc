"""LoRA-Pro: the closest low-rank gradient, its moments, the split with X, and the algorithm written out."""

import copy

import pytest
import torch

from lora_one.optim import LoraPro, create_pair_optimizer
from lora_one.optim.lora_pro import Factors
from lora_one.optim.matrix_functions import eigen
from tests.helpers.factors import backward, each, gradient, products, rebased, scaled_layers, steps


def optimizer_of(layers, **options):
    return create_pair_optimizer(layers, LoraPro, **{"lr": 0.02} | options)


def projector(F):
    """On the column space of F, from the singular value decomposition."""
    U, S, _ = torch.linalg.svd(F, full_matrices=False)
    U = U[:, S > 1e-10]
    return U @ U.T


def first_moments(layers, optimizer):
    return [optimizer.state[layer.B]["exp_avg"] for layer in layers]


def written_out(B, A, s, target, count, *, lr, betas, eps, decay):
    """The paper's AdamW algorithm for one layer: plain inverses, Sylvester's equation as a linear system."""
    m, n, r = len(B), A.shape[1], len(A)
    eye, M, V = torch.eye(r, dtype=B.dtype), torch.zeros(m, n, dtype=B.dtype), torch.zeros(m, n, dtype=B.dtype)

    def split(g_A, g_B, X):
        P = projector(B)
        h_A = torch.linalg.pinv(B.T @ B, hermitian=True) @ g_A / s**2 + X @ A
        return h_A, (torch.eye(m, dtype=B.dtype) - P) @ g_B @ torch.linalg.inv(A @ A.T) / s**2 - B @ X

    def best_X(g_A):
        system = torch.kron(B.T @ B, eye) + torch.kron(eye, A @ A.T)  # on X, row by row
        right = -torch.linalg.pinv(B.T @ B, hermitian=True) @ g_A @ A.T / s**2
        return torch.linalg.solve(system, right.reshape(-1)).reshape(r, r)

    for t in range(1, count + 1):
        G = gradient(B, A, s, target)
        h_A, h_B = split(s * B.T @ G, s * G @ A.T, torch.zeros_like(eye))
        equivalent = s * B @ h_A + s * h_B @ A
        M, V = betas[0] * M + (1 - betas[0]) * equivalent, betas[1] * V + (1 - betas[1]) * equivalent**2
        G = (M / (1 - betas[0] ** t)) / ((V / (1 - betas[1] ** t)).sqrt() + eps)
        g_A, g_B = s * B.T @ G, s * G @ A.T
        h_A, h_B = split(g_A, g_B, best_X(g_A))
        A, B = (1 - lr * decay) * A - lr * h_A, (1 - lr * decay) * B - lr * h_B
    return B, A


@pytest.mark.parametrize("zero_B", [False, True])
def test_equals_the_paper_s_algorithm_written_out(zero_B):
    """Five steps of four layers, two of one shape, each with its own s."""
    layers = scaled_layers(zero_B=zero_B)
    options = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6}
    expected = [written_out(*layer, 5, decay=0.1, **options) for layer in each(layers)]
    steps(layers, optimizer_of(layers, weight_decay=0.1, **options), 5)
    for layer, (B, A) in zip(layers, expected, strict=True):
        torch.testing.assert_close((layer.B.data, layer.A.data), (B, A), rtol=1e-7, atol=1e-9)


def test_the_moment_is_the_projection_of_the_full_gradient():
    """M after one step is (1 - beta1) G~ with G~ = G - (I - P_B) G (I - P_A), so <G, G~> = ||G~||^2."""
    layers = scaled_layers()
    before = each(layers)
    optimizer = optimizer_of(layers)
    steps(layers, optimizer, 1)
    for (B, A, s, target), M in zip(before, first_moments(layers, optimizer), strict=True):
        G, found = gradient(B, A, s, target), M / 0.1
        outside_B = torch.eye(len(B), dtype=B.dtype) - projector(B)
        outside_A = torch.eye(A.shape[1], dtype=A.dtype) - projector(A.T)
        torch.testing.assert_close(found, G - outside_B @ G @ outside_A)
        torch.testing.assert_close((G * found).sum(), found.square().sum())


def test_the_moments_do_not_depend_on_the_basis():
    layers = scaled_layers()
    other = rebased(layers)
    optimizers = [optimizer_of(one, lr=1e-9) for one in (layers, other)]
    for one, optimizer in zip((layers, other), optimizers, strict=True):
        steps(one, optimizer, 2)
    for one, two in zip(*map(first_moments, (layers, other), optimizers), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_steps_do_not_depend_on_a_rotation_of_the_basis():
    layers = scaled_layers()
    other = rebased(layers, orthogonal=True)
    for one in (layers, other):
        steps(one, optimizer_of(one), 5)
    torch.testing.assert_close(products(layers), products(other))
    assert not torch.allclose(layers[0].A, other[0].A, rtol=0.1)


def test_x_gives_the_closest_steps_and_cancels():
    """The distance to g_A, g_B is stationary and minimal at X, and s (B h_A + h_B A) is that without X."""
    generator = torch.Generator().manual_seed(2)
    B, A, G = (torch.randn(1, *size, generator=generator, dtype=torch.float64) for size in ((9, 3), (3, 7), (9, 7)))
    s = 1.5
    g_A, g_B, factors = s * B.mT @ G, s * G @ A.mT, Factors(A, B, s, eigen(A.mT), eigen(B))
    (h_A, h_B), (a, b) = factors.adjusted(g_A, g_B), factors.shortest(g_A, g_B)
    torch.testing.assert_close(B @ h_A + h_B @ A, B @ a + b @ A)

    def distance(change):
        return (h_A + change @ A - g_A).square().sum() + (h_B - B @ change - g_B).square().sum()

    zero = torch.zeros(3, 3, dtype=torch.float64)
    slope = torch.autograd.functional.jacobian(distance, zero)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-9)
    for _ in range(10):
        assert distance(torch.randn(3, 3, generator=generator, dtype=torch.float64)) > distance(zero)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_first_step_from_zero_b_moves_b_alone(dtype):
    """h_A = g_A = 0 and h_B = g_B (A A^T)^-1 / s^2 of the sign of G P_A: Adam's first step, with bias correction."""
    layers = scaled_layers(dtype, zero_B=True)
    before = each(layers)
    A = [layer.A.detach().clone() for layer in layers]
    steps(layers, optimizer_of(layers, lr=0.1, eps=1e-12), 1)
    for layer, old, (_, wide, s, target) in zip(layers, A, before, strict=True):
        assert torch.equal(layer.A, old)
        G = torch.sign(-target @ projector(wide.T))
        h_B = s * G @ wide.T @ torch.linalg.inv(wide @ wide.T) / s**2
        torch.testing.assert_close(layer.B.double(), -0.1 * h_B, rtol=1e-3, atol=1e-4)


def test_a_direction_in_which_b_is_zero_gets_no_step():
    """Two equal columns of B: the pseudo-inverse moves both rows of A alike, as the product asks for."""
    layers = scaled_layers(torch.float32)
    layers[0].B.data[:, 1] = layers[0].B.data[:, 0]
    before = copy.deepcopy(layers)
    optimizer = optimizer_of(layers, lr=1e-3)
    losses = [backward(layers).item()]
    optimizer.step()
    moved = (layers[0].A - before[0].A).detach()
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-3, atol=1e-6)
    assert 0 < moved.abs().max() < 0.01
    for _ in range(20):
        losses.append(backward(layers).item())
        optimizer.step()
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("least", [1e-7, 2e-4])
def test_balanced_factors_with_tiny_directions_stay_finite(least):
    """As after a start from a gradient whose singular values decay: both factors are nearly zero in a direction."""
    layers = scaled_layers(torch.float32)
    for layer in layers:
        U, _, Vh = torch.linalg.svd(layer.B.data @ layer.A.data, full_matrices=False)
        r = layer.A.shape[0]
        S = torch.logspace(0, torch.log10(torch.tensor(least)).item(), r)
        layer.B.data, layer.A.data = U[:, :r] * S.sqrt(), S.sqrt()[:, None] * Vh[:r]
    before = products(layers)
    steps(layers, optimizer_of(layers, lr=1e-6), 3)
    for old, new in zip(before, products(layers), strict=True):
        assert torch.isfinite(new).all() and (new - old).norm() < old.norm()
