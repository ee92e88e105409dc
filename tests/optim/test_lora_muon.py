"""LoRA-Muon: norms of a step, invariance, decay of the product, the start at zero, the algorithm written out."""

import copy

import pytest
import torch

from lora_one.errors import UsageError
from lora_one.optim import LoraMuon, create_pair_optimizer
from tests.helpers.factors import each, gradient, products, rebased, scaled_layers, steps

LR = 0.1


def optimizer_of(layers, **options):
    return create_pair_optimizer(layers, LoraMuon, **{"lr": LR, "damping": 1e-12} | options)


def msign(X):
    """U V^T, of the singular values above rounding."""
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    kept = S.max() * 1e-10 < S
    return U[:, kept] @ Vh[kept]


def symmetric_root(K, damping):
    """(K + damping ||K||_F I)^-1/2, zero for a zero K."""
    w, Q = torch.linalg.eigh(K + damping * K.norm() * torch.eye(len(K), dtype=K.dtype))
    return Q / w.sqrt() @ Q.T if K.norm() > 0 else torch.zeros_like(K)


def written_out(B, A, s, target, count, *, lr, momentum, damping, decay):
    """The paper's algorithm for one layer, with symmetric roots and the SVD; steps are divided by s."""
    M_A, M_B = torch.zeros_like(A), torch.zeros_like(B)
    for _ in range(count):
        G = gradient(B, A, s, target)
        M_A, M_B = (momentum * M + (1 - momentum) * g for M, g in ((M_A, s * B.T @ G), (M_B, s * G @ A.T)))
        R_A, R_B = symmetric_root(A @ A.T, damping), symmetric_root(B.T @ B, damping)
        step_B = -lr / 2 * msign(M_B @ R_A) @ R_A / s
        step_A = -lr / 2 * R_B @ msign(R_B @ M_A) / s
        c = (1 - decay * lr) ** 0.5
        A, B = c * A + step_A / c, c * B + step_B / c
    return B, A


@pytest.mark.parametrize("zero_B", [False, True])
@pytest.mark.parametrize("damping", [1e-5, 1e-2])
def test_equals_the_paper_s_algorithm_written_out(zero_B, damping):
    layers = scaled_layers(zero_B=zero_B)
    options = {"lr": 0.05, "momentum": 0.8, "damping": damping}
    expected = [written_out(*layer, 5, decay=0.5, **options) for layer in each(layers)]
    steps(layers, create_pair_optimizer(layers, LoraMuon, weight_decay=0.5, **options), 5)
    for layer, (B, A) in zip(layers, expected, strict=True):
        torch.testing.assert_close((layer.B.data, layer.A.data), (B, A), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-3)])
def test_each_half_of_a_step_has_the_spectral_norm_of_half_the_learning_rate(dtype, tolerance):
    """||s D_B A|| = ||s B D_A|| = lr / 2, and ||s (D_B A + B D_A)|| <= lr, whatever s."""
    layers = scaled_layers(dtype)
    before = copy.deepcopy(layers)
    steps(layers, optimizer_of(layers, damping=1e-12 if dtype == torch.float64 else 1e-6), 1)
    for old, new in zip(before, layers, strict=True):
        s = old.scaling["default"]
        of_B, of_A = s * (new.B - old.B) @ old.A, s * old.B @ (new.A - old.A)
        for part in (of_B, of_A):
            assert torch.linalg.matrix_norm(part, 2).item() == pytest.approx(LR / 2, rel=tolerance)
        assert torch.linalg.matrix_norm(of_A + of_B, 2) <= LR * (1 + tolerance)


def test_steps_do_not_depend_on_the_basis():
    layers = scaled_layers()
    other = rebased(layers)
    for one in (layers, other):
        steps(one, optimizer_of(one, weight_decay=0.5), 5)
    torch.testing.assert_close(products(layers), products(other), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(layers[0].A, other[0].A, rtol=0.1)


def test_without_a_gradient_decay_multiplies_the_product():
    layers = scaled_layers()
    before = products(layers)
    for parameter in layers.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer_of(layers, weight_decay=2.0).step()
    torch.testing.assert_close(products(layers), [(1 - 2.0 * LR) * product for product in before])


def test_decay_acts_on_the_product_beside_a_step():
    """B A becomes (1 - lr wd) B A + D_B A + B D_A and a term of second order."""
    layers, plain = scaled_layers(), scaled_layers()
    start = products(layers)
    tiny = 1e-5
    steps(layers, optimizer_of(layers, lr=tiny, weight_decay=0.5), 1)
    steps(plain, optimizer_of(plain, lr=tiny), 1)
    for old, decayed, free in zip(start, products(layers), products(plain), strict=True):
        torch.testing.assert_close(decayed - free, -tiny * 0.5 * old, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_first_step_from_zero_b_moves_b_alone(dtype):
    """msign(0) = 0. The step of B has the full spectral norm, so the second step is an ordinary one."""
    layers = scaled_layers(dtype, zero_B=True)
    A = [layer.A.detach().clone() for layer in layers]
    optimizer = create_pair_optimizer(layers, LoraMuon, lr=LR)  # the default damping
    steps(layers, optimizer, 1)
    for layer, old in zip(layers, A, strict=True):
        assert torch.equal(layer.A, old)
        size = torch.linalg.matrix_norm(layer.scaling["default"] * (layer.B @ layer.A).double(), 2).item()
        assert size == pytest.approx(LR / 2, rel=1e-4 if dtype != torch.bfloat16 else 2**-6)
    steps(layers, optimizer, 1)
    assert all(parameter.isfinite().all() for parameter in layers.parameters())
    assert not any(torch.equal(layer.A, old) for layer, old in zip(layers, A, strict=True))


def test_a_factor_without_full_rank_stays_finite():
    layers = scaled_layers(torch.float32)
    layers[0].A.data[1] = layers[0].A.data[0]
    layers[1].B.data[:, 0] = 0
    found = steps(layers, create_pair_optimizer(layers, LoraMuon, lr=1e-2), 20)
    assert all(parameter.isfinite().all() for parameter in found)


def test_decay_that_changes_the_sign_of_the_product_is_refused():
    with pytest.raises(UsageError, match=r"not positive for weight_decay=20 and lr=0.1: lower one of them"):
        optimizer_of(scaled_layers(), weight_decay=20.0)
