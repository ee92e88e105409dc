"""LoRA-RITE: the algorithm written out with QR, invariance, clipping, and factors without full rank."""

import copy

import pytest
import torch

from lora_one.errors import RunError
from lora_one.optim import LoraRite, create_pair_optimizer
from tests.helpers.factors import backward, each, gradient, products, rebased, scaled_layers, steps
from tests.helpers.models import FactorLayer


def optimizer_of(layers, **options):
    return create_pair_optimizer(layers, LoraRite, **{"lr": 0.02} | options)


def written_out(layers, count, *, lr, betas, eps, max_norm, decay):
    """The published algorithm for all layers, with QR and the inverse of its triangle."""
    factors = [(B, A) for B, A, _, _ in layers]
    state = [[(torch.zeros_like(F), torch.zeros_like(F), torch.zeros(r, r, dtype=F.dtype)) for F in (A.T, B)]
             for (B, A) in factors for r in [len(A)]]  # fmt: skip
    for i, (B, A) in enumerate(factors):
        state[i][0] = (torch.zeros_like(B), *state[i][0][1:])  # the basis is that of the partner
        state[i][1] = (torch.zeros_like(A.T), *state[i][1][1:])
    for t in range(1, count + 1):
        b1, b2 = (beta * (1 - beta ** (t - 1)) / (1 - beta**t) for beta in betas)
        unmagnified = []
        for (B, A), (_, _, s, target) in zip(factors, layers, strict=True):
            G = gradient(B, A, s, target)
            pair = []
            for g, partner in ((s * G.T @ B, B), (s * G @ A.T, A.T)):
                U, T = torch.linalg.qr(partner)
                pair.append((g @ torch.linalg.inv(T), U, torch.linalg.inv(T)))
            unmagnified.append(pair)
        norm = sum(g.square().sum() for pair in unmagnified for g, _, _ in pair).sqrt()
        for i, pair in enumerate(unmagnified):
            new = []
            for j, (g, U, T_inverse) in enumerate(pair):
                g = g / max(norm / max_norm, 1) if max_norm else g
                last, M, V = state[i][j]
                P = U.T @ last
                V = b2 * P @ V @ P.T + (1 - b2) * g.T @ g / len(g)
                w, Q = torch.linalg.eigh(V)
                S = g @ (Q / (w.clamp(min=0).sqrt() + eps) @ Q.T)
                M = b1 * M @ P.T + (1 - b1) * S
                state[i][j] = (U, M, V)
                new.append(-lr * M @ T_inverse.T)
            B, A = factors[i]
            factors[i] = ((1 - lr * decay) * B + new[1], (1 - lr * decay) * A + new[0].T)
    return factors


@pytest.mark.parametrize("max_norm", [1.0, 0.0, 1e6])
def test_equals_the_published_algorithm_written_out(max_norm):
    layers = scaled_layers()
    options = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "max_norm": max_norm}
    expected = written_out(each(layers), 6, decay=0.1, **options)
    steps(layers, optimizer_of(layers, weight_decay=0.1, **options), 6)
    for layer, (B, A) in zip(layers, expected, strict=True):
        torch.testing.assert_close((layer.B.data, layer.A.data), (B, A), rtol=1e-6, atol=1e-8)


def test_steps_do_not_depend_on_the_basis():
    layers = scaled_layers()
    other = rebased(layers)
    for one in (layers, other):
        steps(one, optimizer_of(one), 6)
    torch.testing.assert_close(products(layers), products(other), rtol=1e-6, atol=1e-8)
    assert not torch.allclose(layers[0].A, other[0].A, rtol=0.1)


def test_ill_conditioned_basis_gives_the_same_steps_in_fp32():
    """(B Q, Q^-1 A) with a condition number of 1,000: the Gram matrix of B Q has one of a million."""
    layers = scaled_layers(torch.float32)
    other = copy.deepcopy(layers)
    for layer in other:
        r = len(layer.A)
        Q = torch.linalg.qr(torch.randn(r, r, generator=torch.Generator().manual_seed(4)))[0]
        Q = Q * torch.logspace(0, -3, r)
        layer.B.data, layer.A.data = layer.B.data @ Q, torch.linalg.inv(Q.double()).float() @ layer.A.data
    before = products(layers)
    for one in (layers, other):
        steps(one, optimizer_of(one), 6)
    for start, expected, found in zip(before, products(layers), products(other), strict=True):
        assert (found - expected).norm() <= 1e-2 * (expected - start).norm()


def test_first_steps_have_the_size_of_the_learning_rate_in_every_direction():
    """V = g^T g / n, so M = g V^-1/2 has singular values sqrt(n), and the step of A, seen through B, lr sqrt(n)."""
    layers = scaled_layers()
    before = copy.deepcopy(layers)
    steps(layers, optimizer_of(layers, eps=1e-12), 1)
    for old, new in zip(before, layers, strict=True):
        for moved in (old.B @ (new.A - old.A), old.A.T @ (new.B - old.B).T):
            size = torch.linalg.svdvals(moved)[: len(old.A)]
            torch.testing.assert_close(size, torch.full_like(size, 0.02 * moved.shape[1] ** 0.5), rtol=1e-5, atol=0)


def test_gradients_are_clipped_together():
    """A limit below the joint norm changes every layer by the same factor; one above it changes nothing."""
    moments = {}
    for limit in (0.0, 1e6, 1e-3):
        layers = scaled_layers()
        optimizer = optimizer_of(layers, max_norm=limit)
        steps(layers, optimizer, 1)
        moments[limit] = [optimizer.state[layer.B]["exp_avg_sq_A"] for layer in layers]
    torch.testing.assert_close(moments[0.0], moments[1e6])
    factors = [(small / large).mean() for small, large in zip(moments[1e-3], moments[0.0], strict=True)]
    torch.testing.assert_close(factors, [factors[0]] * len(factors))
    assert factors[0] < 1e-6


def multiplied(factor, **options):
    """The factors after one step in fp32 with gradients that are ``factor`` times as large."""
    layers = scaled_layers(torch.float32)
    optimizer = optimizer_of(layers, **options)
    backward(layers)
    for parameter in layers.parameters():
        parameter.grad *= factor
    optimizer.step()
    return [parameter.detach() for parameter in layers.parameters()]


@pytest.mark.parametrize("exponent", [60, 100])
def test_gradients_whose_squares_overflow_are_clipped_like_others(exponent):
    """2^60 is about 1e18. Powers of two change no digit, and the limit removes them, so the step is the same."""
    assert all(map(torch.equal, multiplied(2.0**exponent), multiplied(1.0)))
    assert not torch.equal(multiplied(1.0)[0], scaled_layers(torch.float32)[0].A)


def test_gradients_that_are_not_finite_are_one_error():
    with pytest.raises(RunError, match=r"squares of the gradients \(largest entry: .*lower the learning rate"):
        multiplied(float("inf"))


def test_gradients_whose_squares_overflow_need_no_limit():
    """Second moments are fp64, and their size divides out, except for eps."""
    expected = multiplied(1.0, max_norm=0.0, eps=0.0)
    torch.testing.assert_close(multiplied(2.0**60, max_norm=0.0, eps=0.0), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("max_norm", [1.0, 0.0])
def test_no_direction_of_a_step_is_too_large_in_fp32(max_norm):
    """Singular values of g from 100 to 0.001: their squares differ by 1e10, beyond fp32.

    The step of B, seen through A with orthonormal rows, has the singular values sqrt(m) lr w / (w + eps).
    """
    m, n, r = 64, 96, 8
    generator = torch.Generator().manual_seed(0)
    bases = [torch.linalg.qr(torch.randn(k, r, generator=generator).double())[0] for k in (m, n, r)]
    layer = FactorLayer(bases[0].float(), bases[1].T.float())
    optimizer = optimizer_of(torch.nn.ModuleList([layer]), lr=1.0, max_norm=max_norm)
    sizes = torch.logspace(2, -3, r, dtype=torch.float64)
    layer.A.grad = torch.zeros_like(layer.A)
    layer.B.grad = (bases[0] * sizes @ bases[2].T).float()
    before = layer.B.detach().clone()
    optimizer.step()
    found = torch.linalg.svdvals((layer.B - before).double())
    w = sizes / (sizes.norm().clamp(min=1) if max_norm else 1) / m**0.5
    torch.testing.assert_close(found, m**0.5 * w / (w + 1e-6), rtol=0.05, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_first_step_from_zero_b_moves_b_alone(dtype):
    layers = scaled_layers(dtype, zero_B=True)
    A = [layer.A.detach().clone() for layer in layers]
    optimizer = optimizer_of(layers, lr=0.05)
    steps(layers, optimizer, 1)
    for layer, old in zip(layers, A, strict=True):
        assert torch.equal(layer.A, old) and layer.B.abs().max() > 0
    losses = [backward(layers).item()]
    for _ in range(10):
        optimizer.step()
        losses.append(backward(layers).item())
    assert not any(torch.equal(layer.A, old) for layer, old in zip(layers, A, strict=True))
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_direction_without_rank_gets_no_step(dtype):
    """Two equal columns of B: only their sum acts, so the rows of A move alike, with and without rounding."""
    layers = scaled_layers(dtype)
    layers[0].B.data[:, 1] = layers[0].B.data[:, 0]
    before = layers[0].A.detach().clone()
    steps(layers, optimizer_of(layers), 1)
    moved = layers[0].A.detach() - before
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-3, atol=1e-5)
    assert 0 < moved.abs().max() < 1
