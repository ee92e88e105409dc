"""T4: the ReLU student's error against the claimed rate, and its gradient against the paper's formula."""

import math

import pytest
import torch

from tests.helpers.toys import relu, runs

STEPS = 50


@pytest.fixture(scope="module", params=[0, 1])
def errors(request):
    """(condition, preconditioned) -> rows, for two seeds."""
    return runs(relu.rows(seed=request.param, conditions=(1, 100), steps=STEPS), "condition", "preconditioned")


def rate(rows):
    """The factor by which the error shrinks in a step."""
    return (rows[-1].relative_error / rows[20].relative_error) ** (1 / (rows[-1].step - 20))


def test_the_error_stays_below_the_claimed_rate(errors):
    """||B A - D|| <= (1 - eta / 4)^t x its value at the start, with eta = 1/2, at every step."""
    for condition in (1, 100):
        rows = errors[condition, 1]
        first = rows[0].relative_error
        assert [row.bound for row in rows] == pytest.approx([first * 0.875**step for step in range(STEPS + 1)])
        assert all(row.relative_error <= row.bound * (1 + 1e-9) for row in rows)


def test_the_rate_does_not_depend_on_the_condition_number(errors):
    """Over 4 seeds the factor was 0.845 to 0.851, at kappa = 100 within 0.004 of that at kappa = 1."""
    assert rate(errors[100, 1]) == pytest.approx(rate(errors[1, 1]), abs=0.01)
    assert rate(errors[1, 1]) == pytest.approx(0.848, abs=0.01)


def test_without_preconditioner_it_does(errors):
    assert rate(errors[1, 0]) < 0.86 and rate(errors[100, 0]) > 0.97
    assert errors[100, 0][-1].relative_error > 10 * errors[100, 0][-1].bound


def test_gradient_and_start_are_those_of_the_paper():
    """J = X^T [(relu(X W~) - relu(X W)) o relu'(X W)] / N in the paper's orientation; about D / 2; start 2 [J]_4."""
    student = relu.Student(10, seed=2)
    X, before = student.X, student.X @ student.W.T
    J = X.T @ ((student.targets - before.clamp(min=0)) * (before > 0)) / len(X)  # (n, m)
    torch.testing.assert_close(-student.gradient().T, J)
    U, S, Vh = torch.linalg.svd(J)
    factors = relu.spectral(student.gradient(), 4, gamma=2.0)
    torch.testing.assert_close((factors.B @ factors.A).T, 2 * U[:, :4] * S[:4] @ Vh[:4])
    first = relu.rows(seed=2, conditions=(10,), steps=0)[0]
    assert first.relative_error * 0.01 == pytest.approx(float((factors.B @ factors.A - student.delta).norm()))
    aligned = torch.nn.functional.cosine_similarity(J.flatten(), student.delta.T.flatten() / 2, dim=0)
    assert aligned > 0.9 and (J * student.delta.T).sum() / student.delta.square().sum() == pytest.approx(0.5, abs=0.05)


def test_the_singular_values_have_the_condition_number():
    S = torch.linalg.svdvals(relu.Student(100, seed=0).delta)
    assert S[:4].tolist() == pytest.approx([0.1 * 100 ** (-place / 3) for place in range(4)])
    assert S[4] < 1e-12 and math.isclose(float(S[0] / S[3]), 100)
