"""Bit vectors in the Hessian's metric: every step lowers the loss, and the least-squares step finds its minimum."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantize.formats.bitvec import coefficients, groups_per_row
from quantize.methods.sbvr.fit import Codebook, assign, fit_codebook, round_codes
from quantize.methods.sbvr.solve import (
    Fitted,
    LineBooks,
    _Design,
    _move_lines,
    _refit,
    loss,
    solve,
)
from quantize.solvers.feedback import Damped, damp, feedback_order


def problem(N: int, K: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight [N, K] and a damped Hessian [K, K] of correlated inputs of unlike sizes."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(N, K, generator=generator) * 0.02
    mix = torch.eye(K) + torch.randn(K, K, generator=generator) / K**0.5
    x = (
        torch.randn(4 * K, K, generator=generator)
        @ mix
        * (0.2 + torch.rand(K, generator=generator))
    )
    H = x.T @ x / len(x)
    H.diagonal().add_(0.1 * H.diagonal().mean())
    return w, H


def usable(H: Tensor) -> Damped:
    found = damp(H, 1e-6, feedback_order(H, "activation"))
    assert found is not None
    return found


def random_fit(
    w: Tensor, bits: int, bias: bool, shapes: int, scales: int, group_size: int, seed: int = 0
) -> Fitted:
    generator = torch.Generator().manual_seed(seed)
    lines = (torch.randn(shapes, bits + bias, generator=generator) * 0.02).half().float()
    codebook = Codebook(lines, 0.5 + torch.rand(scales, generator=generator), bits)
    index = torch.randint(
        shapes * scales, (len(w), groups_per_row(w.shape[1], group_size)), generator=generator
    )
    codes = torch.randint(1 << bits, w.shape, generator=generator).float()
    return Fitted(codebook, index.int(), codes, group_size)


def dense_design(fitted: Fitted) -> Tensor:
    """Column c of shape s: what a step of 1 in it does to the weight; float64 [N·K, S·C]."""
    S, C = fitted.codebook.lines.shape
    columns = []
    for s in range(S):
        for c in range(C):
            theta = torch.zeros(S, C)
            theta[s, c] = 1
            table = coefficients(theta, fitted.codebook.scales).double()
            index = fitted.index.long().repeat_interleave(fitted.group_size, dim=1)[
                :, : fitted.codes.shape[1]
            ]
            rows = table[index]  # [N, K, C]
            bits = [(fitted.codes.long() >> k & 1).double() for k in range(fitted.codebook.bits)]
            basis = torch.stack(
                [*bits, *[torch.ones_like(bits[0])] * (C - fitted.codebook.bits)], dim=2
            )
            columns.append((rows * basis).sum(dim=2).flatten())
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize(("bits", "bias"), [(2, True), (3, False), (4, True)])
@pytest.mark.parametrize(("shapes", "scales"), [(5, 1), (3, 4)])
def test_refit_finds_the_least_squares_coefficients(
    bits: int, bias: bool, shapes: int, scales: int
):
    w, H = problem(24, 160)
    fitted = random_fit(w, bits, bias, shapes, scales, 64)
    A, root = dense_design(fitted), torch.linalg.cholesky(H.double())
    mapped = (A.view(24, 160, -1).permute(0, 2, 1) @ root).permute(0, 2, 1).reshape(24 * 160, -1)
    wanted = torch.linalg.lstsq(mapped, (w.double() @ root).flatten()).solution
    minimum = float(((A @ wanted).view(24, 160) - w.double()).matmul(root).square().sum())
    value = fitted.value
    gradient = (value - w) @ H
    for _ in range(6):
        fitted, value, gradient = _refit(w, fitted, value, gradient, H)
    assert torch.equal(value, fitted.value)
    assert torch.allclose(gradient, (value - w) @ H, rtol=1e-4, atol=1e-6)
    assert loss(w, fitted, H) < minimum * 1.002
    assert torch.equal(fitted.codebook.lines, fitted.codebook.lines.half().float())


@pytest.mark.parametrize(("shapes", "scales"), [(5, 1), (3, 4)])
def test_design_and_its_adjoint_are_the_dense_matrix(shapes: int, scales: int):
    w, _ = problem(6, 100)
    fitted = random_fit(w, 3, True, shapes, scales, 64)
    A, design = dense_design(fitted), _Design(fitted)
    theta, weights = torch.randn(shapes, 4).double(), torch.randn(6, 100)
    assert torch.allclose(design.forward(theta).double().flatten(), A @ theta.flatten(), atol=1e-5)
    assert torch.allclose(
        design.adjoint(weights).flatten(), A.T @ weights.double().flatten(), atol=1e-5
    )


@pytest.mark.parametrize(("K", "group_size"), [(256, 64), (200, 128)])
def test_moving_lines_lowers_the_loss_and_keeps_the_books(K: int, group_size: int):
    w, H = problem(32, K)
    codebook, index = fit_codebook(w, 3, group_size, bias=True, lines=12)
    fitted = Fitted(
        codebook, index, round_codes(w, codebook, index, group_size).float(), group_size
    )
    before, value = loss(w, fitted, H), fitted.value
    gradient = (value - w) @ H
    _move_lines(fitted, value, gradient, H)
    assert loss(w, fitted, H) < before
    assert torch.equal(value, fitted.value)
    assert torch.allclose(gradient, (value - w) @ H, atol=1e-6)


def test_books_round_to_the_nearest_level_of_each_row():
    w, _ = problem(7, 256)
    fitted = random_fit(w, 4, True, 9, 1, 64)
    book = LineBooks(fitted.codebook, fitted.index)[2]
    codes, values = book.round(w[:, :5].T)
    table = fitted.codebook.levels[fitted.index[:, 2].long()]
    distance = (w[:, :5, None] - table[:, None, :]).abs()
    assert torch.equal(values, table.gather(1, codes.T.long()).T)
    assert torch.allclose((w[:, :5] - values.T).abs(), distance.amin(dim=2))


@given(
    st.integers(2, 5),
    st.booleans(),
    st.sampled_from([(48, 64), (200, 64), (256, 128)]),
    st.integers(0, 99),
)
@settings(max_examples=12, deadline=None)
def test_solving_beats_rounding(bits: int, bias: bool, sizes: tuple[int, int], seed: int):
    K, group_size = sizes
    w, H = problem(24, K, seed)
    codebook, index = fit_codebook(w, bits, group_size, bias=bias, lines=8, importance=H.diagonal())
    rounded = Fitted(
        codebook, index, round_codes(w, codebook, index, group_size).float(), group_size
    )
    losses = [
        loss(w, solve(w, usable(H), H, (codebook, index), group_size, sweeps), H)
        for sweeps in (0, 1, 3)
    ]
    assert losses[0] < loss(w, rounded, H)
    assert losses[1] <= losses[0]
    assert losses[2] <= losses[1]


def test_solving_leaves_its_arguments_alone():
    w, H = problem(16, 128)
    codebook, index = fit_codebook(w, 3, 64, bias=True, lines=6)
    kept = [tensor.clone() for tensor in (w, H, codebook.lines, codebook.scales, index)]
    solve(w, usable(H), H, (codebook, index), 64, 2)
    for tensor, copy in zip((w, H, codebook.lines, codebook.scales, index), kept, strict=True):
        assert torch.equal(tensor, copy)


def test_uncorrelated_inputs_leave_nothing_to_feed_back():
    w, _ = problem(16, 128)
    codebook, index = fit_codebook(w, 4, 64, bias=True, lines=6)
    H = torch.eye(128)
    assert torch.equal(
        solve(w, usable(H), H, (codebook, index), 64, 0).codes,
        round_codes(w, codebook, index, 64).float(),
    )
    assert torch.equal(index, assign(w, codebook, 64))
