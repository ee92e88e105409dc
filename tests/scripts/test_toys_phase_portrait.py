"""T3: where the paths of three parameters begin and end."""

import math

import numpy
import pytest
import torch

from tests.helpers.toys import phase_portrait, runs


@pytest.fixture(scope="module")
def paths():
    """(seed, start) -> rows."""
    return runs(phase_portrait.rows(), "seed", "start")


def published(seed):
    """The points, y and LoRA's a, drawn as in the authors' notebook."""
    torch.manual_seed(seed)
    X = torch.randn(4, 2)
    return X.double(), X.double() @ torch.tensor([2.0, 1.0]).double(), torch.randn(2).double()


@pytest.mark.parametrize("seed", [7, 3, 18])
def test_paths_begin_as_published_but_with_the_true_gradient(seed, paths):
    X, y, a = published(seed)
    lora, spectral = (paths[seed, start][0] for start in ("LoRA", "spectral"))
    assert (lora.a1, lora.a2, lora.b) == (*a.tolist(), 0.0)
    g = (y[:, None] * X).mean(0)
    expected = [*(g / g.norm().sqrt()).tolist(), g.norm().sqrt().item()]
    assert [spectral.a1, spectral.a2, spectral.b] == pytest.approx(expected, rel=1e-9)
    assert lora.loss == pytest.approx((y.square().sum() / 8).item())


def test_drawing_leaves_the_global_generator_as_it_was():
    torch.manual_seed(1)
    expected = torch.randn(3)
    torch.manual_seed(1)
    phase_portrait.drawn_numbers(7)
    assert torch.equal(torch.randn(3), expected)


@pytest.mark.parametrize("seed", [7, 3, 18])
def test_every_path_ends_on_the_hyperbola(seed, paths):
    """a = (2, 1) / b."""
    for start in ("LoRA", "spectral"):
        end = paths[seed, start][-1]
        assert (end.a1, end.a2) == pytest.approx((2 / end.b, 1 / end.b), abs=1e-4)
        assert end.distance < 1e-4 and end.loss < 1e-9


@pytest.mark.parametrize("seed", [7, 3, 18])
def test_the_spectral_start_is_balanced_and_ends_near_the_balanced_minimiser(seed, paths):
    """Descent nearly keeps |a|^2 - b^2, which is 0 here: b > 0, and b^4 = 5 at the end."""
    first, last = paths[seed, "spectral"][0], paths[seed, "spectral"][-1]
    assert first.a1**2 + first.a2**2 == pytest.approx(first.b**2, rel=1e-9)
    assert first.b > 0 and last.b == pytest.approx(5**0.25, abs=0.01)
    assert first.distance < paths[seed, "LoRA"][0].distance


@pytest.mark.parametrize("seed", [7, 3, 18])
def test_the_branch_of_lora_depends_on_its_random_a(seed, paths):
    """b first moves along -dL/db = a . sum y x / 4; it ends with this sign for the published seeds."""
    X, y, a = published(seed)
    sign = math.copysign(1, (a @ (y[:, None] * X).mean(0)).item())
    path = paths[seed, "LoRA"]
    assert path[1].b * sign > 0
    assert path[-1].b == pytest.approx({7: 1.103, 3: 1.083, 18: -0.804}[seed], abs=2e-3)


def test_the_distance_is_that_to_the_nearest_point_of_a_fine_grid():
    t = numpy.concatenate([-numpy.geomspace(0.05, 50, 200_001), numpy.geomspace(0.05, 50, 200_001)])
    curve = numpy.stack([2 / t, 1 / t, t], axis=1)
    for point in ((0.3, -1.2, 0.0), (-2.0, -1.0, 0.4), (2.0, 1.0, 1.0), (0.1, 3.0, -5.0)):
        expected = numpy.linalg.norm(curve - numpy.array(point), axis=1).min()
        assert phase_portrait.distance(*point) == pytest.approx(expected, abs=1e-4)
