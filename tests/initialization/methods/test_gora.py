"""GoRA against its formulas: ranks within a budget, and B from the gradient by the pseudo-inverse of A."""

import math
import random
from fractions import Fraction

import pytest
import torch

from lora_one.initialization.methods.gora import measure, ranks
from lora_one.types import LayerView
from tests.helpers.runs import run_config, start_of

ALPHA = 16
SHAPES = {"q": (64, 64), "k": (16, 64), "up": (172, 64), "down": (64, 172), "o": (64, 64)}


def settings(*overrides):
    return run_config("init=gora", *overrides).init


def gradient(m, n, seed=0):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def layer(m, n, rank, scaling=None, seed=0):
    W = torch.randn(m, n, generator=torch.Generator().manual_seed(5))
    scaling = ALPHA / rank**0.5 if scaling is None else scaling
    return LayerView("layer", (m, n), lambda: W, rank, scaling, torch.Generator().manual_seed(seed))


def parameters(found, shapes):
    return sum(rank * sum(shapes[name]) for name, rank in found.items())


# factors
@pytest.mark.parametrize("rank", [4, 9])
def test_the_published_formula_with_rslora(rank):
    """B = -(gamma sqrt(n) / alpha) G A^+ with the Moore-Penrose inverse, so s B A = -gamma sqrt(n / r) G A^+ A."""
    m, n = 30, 20
    G = gradient(m, n)
    factors = start_of(settings(), layer(m, n, rank), G)
    inverse = torch.linalg.pinv(factors.A.double()).float()
    torch.testing.assert_close(factors.B, -0.05 * math.sqrt(n) / ALPHA * G @ inverse, rtol=1e-4, atol=1e-6)
    projected = G @ inverse @ factors.A
    s = ALPHA / rank**0.5
    expected = -0.05 * math.sqrt(n / rank) * projected
    torch.testing.assert_close(s * factors.B @ factors.A, expected, rtol=1e-4, atol=1e-6)
    assert (G * (factors.B @ factors.A)).sum() < 0 and not factors.shift_base


def test_no_other_B_is_nearer_to_the_step():
    """B = argmin ||c G + B A||_F: the error is orthogonal to the rows of A."""
    G, rank = gradient(30, 20), 6
    factors = start_of(settings(), layer(30, 20, rank), G)
    c = 0.05 * math.sqrt(20) / ALPHA
    torch.testing.assert_close((c * G + factors.B @ factors.A) @ factors.A.T, torch.zeros(30, rank), rtol=0, atol=1e-6)


def test_the_step_is_gamma_times_the_gradient_in_the_mean():
    sizes = []
    for seed in range(10):
        G = gradient(400, 300, seed)
        factors = start_of(settings(), layer(400, 300, 8, seed=seed), G)
        sizes.append(float(ALPHA / 8**0.5 * (factors.B @ factors.A).norm() / G.norm()))
    assert sum(sizes) / 10 == pytest.approx(0.05, rel=0.05)


def test_the_step_does_not_depend_on_the_scaling():
    G = gradient(30, 20)
    one, other = (start_of(settings(), layer(30, 20, 5, scaling), G) for scaling in (1.0, 6.0))
    torch.testing.assert_close(one.B @ one.A, 6.0 * other.B @ other.A)


def test_A_is_kaiming_uniform_and_a_smaller_rank_has_its_first_rows():
    found = measure(settings(), layer(40, 900, 8), gradient(40, 900))
    assert found.A.shape == (32, 900) and found.GA.shape == (40, 32)
    assert 0.99 / 30 < found.A.abs().max() <= 1 / 30
    assert float(found.A.square().mean()) == pytest.approx(1 / (3 * 900), rel=0.03)
    assert torch.equal(start_of(settings(), layer(40, 900, 8), gradient(40, 900)).A, found.A[:8])


def test_the_importance_is_the_mean_of_the_products():
    view, G = layer(7, 5, 4), gradient(7, 5)
    W = view.weight()
    expected = sum(abs(float(W[i, j] * G[i, j])) for i in range(7) for j in range(5)) / 35
    assert measure(settings(), view, G).importance == pytest.approx(expected, rel=1e-5)


# ranks
def test_equal_layers_get_the_reference_rank():
    shapes = {f"layer {i}": (48, 32) for i in range(6)}
    assert set(ranks(settings(), dict.fromkeys(shapes, 0.3), shapes, 8).values()) == {8}


def test_the_share_of_the_parameters_is_the_share_of_the_importance():
    """Without clipping: r_i (m_i + n_i) / budget = I_i / sum I, to one rank."""
    shapes = {"a": (600, 400), "b": (600, 400), "c": (1000, 400), "d": (400, 1000)}
    importances = {"a": 1.0, "b": 2.0, "c": 1.5, "d": 3.0}
    wide = settings("init.min_rank=1", "init.max_rank=400")
    found = ranks(wide, importances, shapes, 100)
    budget = 100 * (1000 + 1000 + 1400 + 1400)
    assert parameters(found, shapes) == budget
    for name, value in importances.items():
        assert abs(found[name] - budget * value / 7.5 / sum(shapes[name])) <= 1


def test_equal_layers_are_rounded_to_the_largest_remainders():
    """Hamilton's apportionment, with fractions: the floor of each share, and the rest to the largest remainders."""
    draw = random.Random(3)
    wide = settings("init.min_rank=1", "init.max_rank=400")
    for _ in range(20):
        parts = [Fraction(draw.randint(100, 1000)) for _ in range(7)]
        shapes = {f"layer {i}": (600, 400) for i in range(7)}
        shares = [20 * 7 * part / sum(parts) for part in parts]
        expected = [int(share) for share in shares]
        by_remainder = sorted(range(7), key=lambda i: shares[i] - int(shares[i]), reverse=True)
        for i in by_remainder[: 20 * 7 - sum(expected)]:
            expected[i] += 1
        found = ranks(wide, dict(zip(shapes, map(float, parts), strict=True)), shapes, 20)
        assert list(found.values()) == expected


def test_the_budget_is_exact_for_equal_costs_and_never_exceeded():
    draw = random.Random(0)
    for trial in range(40):
        equal = trial % 2 == 0
        shapes = {f"{name} {i}": (64, 64) if equal else shape for i in range(5) for name, shape in SHAPES.items()}
        importances = {name: draw.lognormvariate(0, 2) for name in shapes}
        if trial % 7 == 0:
            importances["q 0"] = 0.0
        found = ranks(settings(), importances, shapes, 8)
        budget = 8 * sum(map(sum, shapes.values()))
        missing = budget - parameters(found, shapes)
        assert all(4 <= rank <= min(32, *shapes[name]) for name, rank in found.items())
        not_full = [sum(shapes[name]) for name, rank in found.items() if rank < min(32, *shapes[name])]
        assert 0 <= missing < min(not_full)
        assert missing == 0 or not equal


def test_more_important_layers_of_one_shape_get_no_smaller_rank():
    shapes = {f"layer {i}": (48, 32) for i in range(9)}
    draw = random.Random(1)
    importances = {name: draw.lognormvariate(0, 1) for name in shapes}
    found = ranks(settings(), importances, shapes, 8)
    by_importance = [found[name] for name in sorted(shapes, key=importances.get)]
    assert by_importance == sorted(by_importance) and len(set(by_importance)) > 2


@pytest.mark.parametrize("power", [1e-9, 1e6])
def test_ranks_do_not_depend_on_the_loss_s_scale(power):
    importances = {"q": 0.3, "k": 0.11, "up": 1.7, "down": 0.23, "o": 0.05}
    found = ranks(settings(), importances, SHAPES, 8)
    assert ranks(settings(), {name: value * power for name, value in importances.items()}, SHAPES, 8) == found


def test_zero_gradients_are_refused():
    with pytest.raises(ValueError, match="the gradients of all layers are zero"):
        ranks(settings(), dict.fromkeys(SHAPES, 0.0), SHAPES, 8)
    with pytest.raises(ValueError, match="layer layer contains values that are not finite"):
        measure(settings(), layer(7, 5, 4), torch.full((7, 5), float("nan")))
