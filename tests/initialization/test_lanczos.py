"""Lanczos' method against eigenvalues that are known, and what it says when its limit ends it."""

import pytest
import torch

from lora_one.initialization.lanczos import largest_eigenvalue


@pytest.mark.parametrize("values", [[3.0, 1.0, 0.5, -9.0], [-1.0, -2.0, -3.0, -4.0], [0.0, 0.0, 0.0, 0.0]])
def test_lanczos_finds_the_largest_eigenvalue_not_the_one_of_largest_magnitude(values):
    Q = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    M = Q * torch.tensor(values, dtype=torch.float64) @ Q.T
    start = torch.ones(4, dtype=torch.float64)
    assert largest_eigenvalue(M.matmul, start, tolerance=1e-8, limit=9).value == pytest.approx(max(values), abs=1e-9)


def test_the_limit_of_products_is_reported_with_a_bound_of_the_error():
    """Eigenvalues 1 to 60: a few products are not enough for 1e-6, and more of them come closer."""
    values = torch.arange(1.0, 61.0, dtype=torch.float64)
    start = torch.ones(60, dtype=torch.float64)
    found = [largest_eigenvalue(values.mul, start, tolerance=1e-6, limit=limit) for limit in (5, 15, 60)]
    assert [eigenvalue.converged for eigenvalue in found] == [False, False, True]
    assert [eigenvalue.products for eigenvalue in found[:2]] == [5, 15]
    for eigenvalue in found:
        assert (values - eigenvalue.value).abs().min() <= eigenvalue.error + 1e-9
    assert found[0].value < found[1].value < 60 and found[2].value == pytest.approx(60)
