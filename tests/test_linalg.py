"""The low-rank step against the exact SVD."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lora_one import linalg
from lora_one.adaptation.layers import lora_layers, shift_base
from lora_one.adaptation.merging import merge_adapter
from lora_one.linalg import last_triplets, still_to_gain, truncated_svd, usable
from tests.helpers.runs import attach_llama


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def with_spectrum(m, n, power, seed=0, dtype=torch.float32):
    """(m, n) with singular values k^-power."""
    k = min(m, n)
    U = torch.linalg.qr(torch.randn(m, k, generator=generator(seed), dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(n, k, generator=generator(seed + 1), dtype=torch.float64)).Q
    S = torch.arange(1, k + 1, dtype=torch.float64) ** -power
    return (U * S @ V.T).to(dtype)


def svd(matrix, rank, tolerance=1e-3, seed=0):
    return truncated_svd(matrix, rank, tolerance=tolerance, generator=generator(seed))


@pytest.mark.parametrize("shape", [(16, 10), (10, 16), (300, 700), (700, 300)])
def test_is_the_best_approximation(shape):
    M = with_spectrum(*shape, power=1.0)
    step = svd(M, 4, tolerance=1e-12)
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    best = U[:, :4] * S[:4] @ Vh[:4]
    assert (step.U * step.S @ step.Vh - best).norm() < 1e-3 * best.norm()
    torch.testing.assert_close(step.S, S[:4], rtol=1e-4, atol=1e-6)
    assert step.energy == pytest.approx(float(S[:4].square().sum() / S.square().sum()), rel=1e-4)


@pytest.mark.parametrize("power", [0.3, 0.5, 1.0])
def test_loses_no_more_energy_than_the_tolerance(power):
    M = with_spectrum(400, 600, power)
    best = torch.linalg.svdvals(M)[:8].square().sum()
    assert svd(M, 8).S.square().sum() >= (1 - 1e-3) * best
    captured = (svd(M, 8).U.T @ M).square().sum()
    assert captured >= (1 - 1e-3) * best


@pytest.mark.parametrize("rank", [8, 16, 32])
def test_loses_no_more_where_the_spectrum_ends_in_noise(rank):
    """Some strong directions that settle at once, then a bulk that hardly decays, as gradients and their signs have."""
    M = torch.randn(400, 300, generator=generator(1))
    strong = torch.randn(400, 20, generator=generator(2)) * torch.logspace(0, -3, 20)
    M += strong @ torch.randn(20, 300, generator=generator(3))
    for matrix in (M, M.sign()):
        best = torch.linalg.svdvals(matrix)[:rank].square().sum()
        assert svd(matrix, rank).S.square().sum() >= (1 - 1e-3) * best


@pytest.mark.parametrize("shape", [(1024, 1024), (1024, 2816)])
@pytest.mark.parametrize("power", [0.3, 0.5])
def test_slow_decay_at_the_size_of_a_model(shape, power):
    """On a diagonal, which a Gaussian sketch cannot tell from any other singular vectors."""
    S = torch.arange(1, 1025) ** -power
    M = torch.zeros(shape)
    M.diagonal().copy_(S)
    step, best = svd(M, 8), S[:8].square().sum()
    assert (step.U.T @ M).square().sum() >= (1 - 1e-3) * best
    assert (M @ step.Vh.T).square().sum() >= (1 - 1e-3) * best


def dominated(size, first, power):
    """(M, U, S, V) with S_1 = ``first`` above a tail i^-power; M in fp32, the rest in fp64."""
    U = torch.linalg.qr(torch.randn(size, size, generator=generator(0), dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(size, size, generator=generator(1), dtype=torch.float64)).Q
    S = torch.arange(1, size + 1, dtype=torch.float64) ** -power
    S[0] = first
    return (U * S @ V.T).float(), U, S, V


def captured(M, vectors, S):
    """The share of sigma_i^2 that each left vector captures by itself."""
    return (vectors.double().T @ M.double()).square().sum(dim=1) / S.square()


@pytest.mark.parametrize("first", [1.0, 30.0, 3e3, 1e5])
@pytest.mark.parametrize("power", [0.3, 0.5, 1.0])
def test_dominant_direction_does_not_hide_others(first, power):
    """Each of 16 directions captures its sigma_i^2, and lies in the exact span at least as well as svd_lowrank's."""
    M, U, S, _ = dominated(600, first, power)
    step = svd(M, 16)
    assert (captured(M, step.U, S[:16]) >= 1 - 1e-3).all()
    assert (captured(M.T, step.Vh.T, S[:16]) >= 1 - 1e-3).all()
    torch.manual_seed(0)
    rival = torch.svd_lowrank(M, q=32, niter=4)[0][:, :16]

    def cosine(vectors):
        return float(torch.linalg.svdvals(vectors[:, 8:16].double().T @ U[:, :16]).min())

    assert cosine(step.U) >= cosine(rival) - 1e-4  # at 1e5 both are at fp32's own error


def test_stops_at_directions_below_fp32_precision(monkeypatch):
    """Of a matrix of rank 3 beside rounding errors: one block finds it, and three of the 8 values are usable."""
    monkeypatch.setattr(linalg, "MAX_BLOCKS", 2)
    M = torch.randn(400, 3, generator=generator(1)) @ torch.randn(3, 300, generator=generator(2))
    step = svd(M + 1e-8 * torch.randn(400, 300, generator=generator(3)), 8)
    assert usable(step.S) == 3
    assert (captured(M, step.U[:, :3], torch.linalg.svdvals(M.double())[:3]) >= 1 - 1e-5).all()


@pytest.mark.parametrize("shape", [(200, 1500), (384, 1536)])
@pytest.mark.parametrize("rank", [1, 3])
def test_rounding_errors_of_the_decomposition_itself_are_not_directions(shape, rank):
    """As in the gradient of a head, a sum of a few outer products in fp32."""
    m, n = shape
    M = torch.randn(m, rank, generator=generator(1)) @ torch.randn(rank, n, generator=generator(2))
    assert usable(svd(M, 8).S) == rank


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_the_product_is_accurate_beyond_the_tolerance(power):
    """U diag(S) Vh to 1e-5 of its norm where a few blocks reach that, whatever the tolerance is."""
    M, U, S, V = dominated(600, 1.0, power)
    step = svd(M, 8, tolerance=0.5)
    best = U[:, :8] * S[:8] @ V[:, :8].T
    assert (step.U.double() * step.S @ step.Vh.double() - best).norm() <= 1e-5 * best.norm()


def test_flat_spectrum():
    M = torch.randn(600, 500, generator=generator())
    best = torch.linalg.svdvals(M)[:8].square().sum()
    assert (svd(M, 8).U.T @ M).square().sum() >= (1 - 2e-3) * best


@pytest.mark.parametrize("shape", [(40, 30), (400, 300)])
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e20])
def test_matrix_of_lower_rank_than_requested(shape, scale):
    left, right = torch.randn(shape[0], 3, generator=generator(1)), torch.randn(3, shape[1], generator=generator(2))
    M = left @ right * scale
    step = svd(M, 8)
    torch.testing.assert_close(step.U * (step.S / scale) @ step.Vh, M / scale, rtol=0, atol=1e-4)
    assert step.energy == pytest.approx(1.0, abs=1e-4)
    assert (step.S[3:] <= 1e-5 * step.S[0]).all()
    torch.testing.assert_close(step.U.T @ step.U, torch.eye(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(step.Vh @ step.Vh.T, torch.eye(8), atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_scale_of_the_matrix_does_not_matter(scale):
    M = with_spectrum(400, 300, power=0.5)
    one, scaled = svd(M, 8, 1e-6), svd(M * scale, 8, 1e-6)
    torch.testing.assert_close(scaled.S / scale, one.S, rtol=1e-4, atol=0)
    assert scaled.energy == pytest.approx(one.energy, rel=1e-4)


def test_very_ill_conditioned():
    """Singular values from 1 to 1e-12: the leading ones to fp32 precision, every factor orthonormal."""
    S = torch.logspace(0, -12, 300, base=10)
    M = torch.linalg.qr(torch.randn(400, 300, generator=generator(1))).Q * S
    step = svd(M, 8, 1e-9)
    torch.testing.assert_close(step.S, S[:8], rtol=1e-4, atol=0)
    torch.testing.assert_close(step.U.T @ step.U, torch.eye(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(step.Vh @ step.Vh.T, torch.eye(8), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(16, 10), (400, 300)])
def test_factors_are_orthonormal_and_deterministic_with_fixed_signs(shape):
    M = with_spectrum(*shape, power=0.5)
    one, two = svd(M, 5), svd(M, 5)
    torch.testing.assert_close(one.U.T @ one.U, torch.eye(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(one.Vh @ one.Vh.T, torch.eye(5), atol=1e-5, rtol=0)
    assert torch.equal(one.U, two.U) and torch.equal(one.Vh, two.Vh)
    largest = one.U.gather(0, one.U.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


def test_signs_do_not_depend_on_the_sketch():
    M = with_spectrum(400, 300, power=1.0)
    torch.testing.assert_close(svd(M, 3, 1e-8, seed=0).U, svd(M, 3, 1e-8, seed=7).U, atol=1e-3, rtol=0)


def test_half_precision_is_decomposed_in_fp32():
    M = with_spectrum(20, 12, power=1.0, dtype=torch.bfloat16)
    step = svd(M, 3)
    assert step.U.dtype == step.S.dtype == step.Vh.dtype == torch.float32
    torch.testing.assert_close(step.S, torch.linalg.svdvals(M.float())[:3])


def test_zero_matrix_captures_nothing():
    assert svd(torch.zeros(5, 4), 2).energy == 0.0


@pytest.mark.parametrize("rank", [0, 5])
def test_rank_out_of_range(rank):
    with pytest.raises(ValueError, match=rf"\[1, 4\].*got {rank}"):
        svd(torch.randn(4, 6), rank)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rejects_values_that_are_not_finite(bad):
    M = torch.ones(4, 6)
    M[1, 2] = bad
    with pytest.raises(ValueError, match="not finite"):
        svd(M, 2)


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ([1.0, 0.0], 0.0),
        ([1.0, 1e-6], 1e-6),  # not less than a ratio of 1/2 gives
        ([1.0, 0.64], 0.64 * 0.8 / 0.2),  # a ratio of 0.8 for half a step
        ([1.0, 1e-20, 0.0], 0.0),
        ([0.0, 0.0], 0.0),
        ([0.5, 0.6], float("inf")),  # no sign of convergence yet
    ],
)
def test_remaining_gain_is_a_geometric_series(errors, expected):
    assert still_to_gain(errors) == pytest.approx(expected)


@pytest.mark.parametrize("active", [17, 33, 60])
@pytest.mark.parametrize("transposed", [False, True])
def test_zero_rows_do_not_affect_the_others(active, transposed):
    """Units that were never active: new directions soon hold rounding errors alone, which must not count twice."""
    M = torch.zeros(300, 400)
    M[:active] = torch.randn(active, 400, generator=torch.Generator().manual_seed(0))
    M = M.T if transposed else M
    found = truncated_svd(M, 8, tolerance=1e-3, generator=torch.Generator().manual_seed(1))
    U, S, Vh = torch.linalg.svd(M.double(), full_matrices=False)
    best = U[:, :8] * S[:8] @ Vh[:8]
    assert ((found.U * found.S @ found.Vh) - best).norm() <= 1e-4 * best.norm()
    torch.testing.assert_close(found.S.double(), S[:8], rtol=1e-5, atol=0)
    torch.testing.assert_close(found.U.T @ found.U, torch.eye(8), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (25, 25)], ids=str)
def test_last_triplets_are_those_of_the_exact_svd(shape):
    M = torch.randn(*shape, generator=torch.Generator().manual_seed(2))
    U, S, Vh = torch.linalg.svd(M.double(), full_matrices=False)
    found, largest = last_triplets(M, 4)
    assert found.U.dtype == torch.float32 and largest == pytest.approx(float(S[0]), rel=1e-6)
    torch.testing.assert_close(found.S, S[-4:].float(), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        found.U * found.S @ found.Vh, (U[:, -4:] * S[-4:] @ Vh[-4:]).float(), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(found.U.T @ found.U, torch.eye(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.Vh @ found.Vh.T, torch.eye(4), rtol=0, atol=1e-5)
    assert found.energy == pytest.approx(float(S[-4:].square().sum() / S.square().sum()), rel=1e-6)
    assert (found.U.gather(0, found.U.abs().argmax(dim=0, keepdim=True)) > 0).all()


def test_last_triplets_refuse_what_has_none():
    with pytest.raises(ValueError, match="rank must lie in"):
        last_triplets(torch.ones(5, 4), 5)
    with pytest.raises(ValueError, match="not finite"):
        last_triplets(torch.full((5, 4), float("inf")), 2)


class Precisions(TorchDispatchMode):
    """The precision that is set for fp32 products on GPUs at every product of matrices."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._opname in ("mm", "bmm", "addmm"):
            self.found.append(torch.backends.cuda.matmul.fp32_precision)
        return func(*args, **(kwargs or {}))


def test_decompositions_start_and_merge_do_not_use_tf32():
    """Whatever the user has set; rounded to TF32, [M]_r has errors of 4e-4."""
    model, large, small = attach_llama()[0], with_spectrum(300, 280, 1.0), with_spectrum(30, 20, 1.0)
    factors = {
        name: (layer.lora_B["default"].weight, layer.lora_A["default"].weight)
        for name, layer in lora_layers(model).items()
    }
    setting = torch.backends.cuda.matmul
    before, setting.fp32_precision = setting.fp32_precision, "tf32"
    try:
        for work in (
            lambda: svd(large, 4),
            lambda: last_triplets(small, 4),
            lambda: shift_base(model, factors),
            lambda: merge_adapter(model),
        ):
            with Precisions() as seen:
                work()
            assert seen.found and set(seen.found) == {"ieee"}
            assert setting.fp32_precision == "tf32"
    finally:
        setting.fp32_precision = before
