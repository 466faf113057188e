"""Products that leave out what is zero or the same, against the whole ones in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantize.solvers.products import (
    invert_lower_,
    quadratic,
    strips,
    times_upper_,
    times_upper_transposed_,
    turn_,
)

SIZES = pytest.mark.parametrize("K", [1, 7, 512, 513, 1500])


def near(found: Tensor, exact: Tensor) -> bool:
    return float((found.double() - exact).norm()) <= 1e-5 * float(exact.norm())


@pytest.mark.parametrize("K", [1, 511, 512, 513, 4096, 4097, 11008])
def test_strips_are_wide_few_and_cover_every_column(K: int):
    found = list(strips(K))
    assert [i for span in found for i in range(K)[span]] == list(range(K))
    assert len(found) <= 8
    assert all(span.stop - span.start >= 512 for span in found[:-1])


@SIZES
def test_a_quadratic_form_reads_half_of_its_metric(K: int):
    x, rows = torch.randn(K + 3, K), torch.randn(5, K)
    metric = x.T @ x / K
    exact = (rows.double() @ metric.double() * rows.double()).sum(dim=1)
    assert near(quadratic(rows, metric), exact)
    below = metric.tril(-1)
    for span in strips(K):
        below[span, span] = 0
    assert torch.equal(quadratic(rows, metric - below), quadratic(rows, metric))


@SIZES
def test_triangular_products_are_those_of_the_whole_matrix(K: int):
    upper, rows = torch.randn(K, K).triu(), torch.randn(5, K)
    exact = rows.double() @ upper.double()
    assert near(times_upper_(rows.clone(), upper), exact)
    exact = rows.double() @ upper.double().T
    assert near(times_upper_transposed_(rows.clone(), upper), exact)


@SIZES
@pytest.mark.parametrize("by_columns", [False, True])
def test_a_lower_triangle_is_inverted_in_place(K: int, by_columns: bool):
    x = torch.randn(2 * K, K)
    exact = torch.linalg.cholesky((x.T @ x / K + torch.eye(K)).double())
    lower = exact.float().T.contiguous().T if by_columns else exact.float()
    assert invert_lower_(lower) is lower
    assert near(lower, torch.linalg.inv(exact))
    assert torch.equal(lower, lower.tril())


@SIZES
@pytest.mark.parametrize("by_columns", [False, True])
def test_a_matrix_is_turned_in_place(K: int, by_columns: bool):
    matrix = torch.randn(K, K)
    turned = matrix.flip(0, 1)
    matrix = matrix.T.contiguous().T if by_columns else matrix
    assert torch.equal(turn_(matrix), turned)
