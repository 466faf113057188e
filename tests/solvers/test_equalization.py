"""Channel scales: what they minimize, that the search finds it, and what must not change it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantize.solvers.equalization import Feedback, Rows, equalize, feedback_error
from quantize.solvers.feedback import damp, error_feedback, feedback_order
from quantize.solvers.grid import Grid

GRID = Grid(4, 32, signed=True)


def weight(N: int, K: int, seed: int = 0, spread: float = 0.5) -> Tensor:
    """Columns of different sizes, each row with a pattern of its own."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp(spread * torch.randn(K, generator=generator))
    return 0.02 * sizes * torch.randn(N, K, generator=generator)


def second_moments(K: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(K, K, generator=generator) * K**-0.5 + 0.5 * torch.eye(K)
    x = torch.randn(8 * K, K, generator=generator) @ mix
    x = x * torch.exp(0.5 * torch.randn(K, generator=generator))
    return x.T @ x / len(x)


def same(values: Tensor) -> Tensor:
    return values


def modelled(w: Tensor, left: Tensor, group_size: int, scale: Tensor, begin: Any = 1.0) -> Tensor:
    """The loss as its docstring has it, in float64 and with no care for overflow."""
    w, left, scale = w.double(), left.double(), scale.double()
    size = (w * begin).square().mean(dim=1, keepdim=True).sqrt()
    grouped = (w * scale).abs().view(len(w), -1, group_size)
    steps = grouped.pow(8).mean(dim=2).pow(2 / 8) / size
    return (steps.sum(dim=0) * (left / scale**2).view(-1, group_size).sum(dim=1)).sum()


def test_rows_that_are_alike_have_their_balance_in_closed_form():
    left = torch.exp(torch.randn(64, generator=torch.Generator().manual_seed(1)))
    row = weight(1, 64)
    found = equalize([row.expand(5, 64)], left, 32, 8, torch.ones(64), same, same)
    # λ^(p+2) ∝ left / |w|^p within a group.
    wanted = (left / row[0].abs() ** 8) ** (1 / 10)
    ratio = (found / wanted).view(2, 32)
    assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-2)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), spread=st.floats(0, 2))
def test_no_scale_nearby_is_better(seed: int, spread: float):
    w, left = weight(24, 96, seed, spread), second_moments(96, seed).diagonal()
    found = equalize([w], left, 32, 8, torch.ones(96), same, same)
    assert torch.isfinite(found).all()
    assert (found > 0).all()
    exact = found.double().log().requires_grad_(True)
    loss = modelled(w, left, 32, exact.exp())
    (slope,) = torch.autograd.grad(loss.log(), exact)
    # Of the whole loss, by a channel's e-fold.
    assert float(slope.abs().max()) < 0.01
    generator = torch.Generator().manual_seed(seed)
    for size in (0.02, 0.1, 0.5):
        other = found * torch.exp(size * torch.randn(96, generator=generator))
        assert modelled(w, left, 32, other) > loss * (1 - 1e-3)


def test_it_gets_there_from_anywhere_and_never_ends_worse_than_it_began():
    w, left = weight(40, 64), second_moments(64).diagonal()
    generator = torch.Generator().manual_seed(2)
    losses = []
    for size in (0.0, 0.5, 2.0):
        start = torch.exp(size * torch.randn(64, generator=generator))
        found = equalize([w], left, 32, 8, start, same, same)
        began, ended = (float(modelled(w, left, 32, s, start)) for s in (start, found))
        assert ended <= began * (1 + 1e-5)
        # Rows count by where it began, so it can begin elsewhere only where rows are alike.
        row = weight(1, 64).expand(3, 64)
        losses.append(
            float(modelled(row, left, 32, equalize([row], left, 32, 8, start, same, same)))
        )
    assert max(losses) < 1.002 * min(losses)


def test_a_channel_that_moved_already_ends_where_it_would_have():
    w, left = weight(40, 64), second_moments(64).diagonal()
    moved = torch.exp(2 * torch.randn(64, generator=torch.Generator().manual_seed(3)))
    plain = equalize([w], left, 32, 8, torch.ones(64), same, same)
    again = equalize([w * moved], left / moved**2, 32, 8, 1 / moved, same, same)
    assert torch.allclose(again * moved, plain, rtol=1e-3)


def test_linears_and_pieces_add_up(monkeypatch: pytest.MonkeyPatch):
    w, left = weight(40, 64), second_moments(64).diagonal()
    parts = [w[:10].bfloat16(), w[10:]]
    whole = torch.cat([parts[0].float(), parts[1]])
    together = equalize([whole], left, 32, 8, torch.ones(64), same, same)
    apart = equalize(parts, left, 32, 8, torch.ones(64), same, same)
    assert torch.allclose(apart, together, rtol=1e-4)
    monkeypatch.setattr("quantize.solvers.equalization._PIECE", 64 * 3)
    apart = equalize(parts, left, 32, 8, torch.ones(64), same, same)
    assert torch.allclose(apart, together, rtol=1e-4)


def test_a_row_four_times_as_large_counts_as_four():
    w, left = weight(40, 64), second_moments(64).diagonal()
    large = torch.cat([w[:39], 4 * w[39:]])
    four = torch.cat([w[:39], w[39:].expand(4, 64)])
    ones = torch.ones(64)
    found = [equalize([rows], left, 32, 8, ones, same, same) for rows in (large, four)]
    assert torch.allclose(*found, rtol=1e-4)


def test_channels_that_share_a_source_get_one_scale():
    w, left = weight(40, 64), second_moments(64).diagonal()

    def columns(scale: Tensor) -> Tensor:
        return scale.repeat(2)

    def sources(values: Tensor) -> Tensor:
        return values.view(2, 32).sum(dim=0)

    found = equalize([w], left, 32, 8, torch.ones(32), columns, sources)
    exact = found.double().log().requires_grad_(True)
    loss = modelled(w, left, 32, columns(exact.exp()))
    (slope,) = torch.autograd.grad(loss.log(), exact)
    assert found.shape == (32,)
    assert float(slope.abs().max()) < 0.01
    assert loss < modelled(w, left, 32, torch.ones(64))


def test_channels_without_weights_or_inputs_get_usable_scales():
    w, left = weight(16, 64), second_moments(64).diagonal().clone()
    w[:, :3] = 0
    w[:, 32:] = 0
    left[2:6] = 1e-20
    found = equalize([w], left, 32, 8, torch.ones(64), same, same)
    assert torch.isfinite(found).all()
    assert (found > 0).all()


def test_what_feedback_leaves_is_the_conditional_variance():
    H = second_moments(48)
    feedback = Feedback.of(H, torch.ones(48), 0.01)
    assert feedback is not None
    damped = H.double() + 0.01 * H.diagonal().double().mean() * torch.eye(48, dtype=torch.float64)
    order = feedback.usable.order.tolist()
    for place in (0, 7, 46):
        # From the definition: what a regression on those rounded later does not explain.
        j, later = order[place], order[place + 1 :]
        explained = damped[j, later] @ torch.linalg.solve(damped[later][:, later], damped[later, j])
        wanted = float(damped[j, j] - explained)
        assert float(feedback.left(1.0)[j]) == pytest.approx(wanted, rel=1e-4)
        between = (wanted * float(damped[j, j])) ** 0.5
        assert float(feedback.left(0.5)[j]) == pytest.approx(between, rel=1e-4)
    assert torch.allclose(feedback.left(0.0).double(), damped.diagonal(), rtol=1e-5)


def test_what_feedback_leaves_adds_up_to_the_error():
    """Of a rounding that feeds back, whatever the grid: the squares of residuals before feedback, so weighed."""
    H, w = second_moments(64), weight(10, 64)
    feedback = Feedback.of(H, torch.ones(64), 0.1)
    assert feedback is not None
    usable = feedback.usable
    rounded, _ = error_feedback(w, usable, GRID, *GRID.fit_scale(w))
    delta = (w - rounded.value(GRID)).double()[:, usable.order]
    damped = H.double() + usable.delta * torch.eye(64, dtype=torch.float64)
    damped = damped[usable.order][:, usable.order]
    # Residuals before feedback: delta_j and what of the later ones was moved there, H = L D Lᵀ with unit L.
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    residual = delta @ torch.linalg.inv(upper) * upper.diagonal()
    left = feedback.left(1.0).double()[usable.order]
    assert float((residual.square() * left).sum()) == pytest.approx(
        float((delta @ damped * delta).sum()), rel=1e-4
    )


@pytest.mark.parametrize("reach", [1.0, 0.5])
def test_damping_is_relative_to_weights_of_one_size(reach: float):
    H, spread = second_moments(48), torch.linspace(0.1, 30, 48)
    plain = Feedback.of(H, torch.ones(48), 0.1)
    moved = Feedback.of(H * spread * spread[:, None], spread, 0.1)
    assert plain is not None
    assert moved is not None
    assert torch.allclose(moved.left(reach), plain.left(reach) * spread**2, rtol=1e-3)


def test_dead_inputs_count_by_the_damping_alone():
    H = second_moments(48)
    H[5], H[:, 5] = 0, 0
    feedback = Feedback.of(H, torch.full((48,), 2.0), 0.1)
    assert feedback is not None
    live = float(H.diagonal()[H.diagonal() > 0].mean())
    for reach in (1.0, 0.5):
        assert float(feedback.left(reach)[5]) == pytest.approx(0.1 * live, rel=1e-4)


def test_a_hessian_that_is_not_finite_is_left_alone():
    assert Feedback.of(torch.full((8, 8), torch.nan), torch.ones(8), 0.1) is None
    assert Feedback.of(torch.zeros(8, 8), torch.ones(8), 0.1) is None


@pytest.mark.parametrize("seed", range(3))
def test_the_error_under_a_scale_is_that_of_the_scaled_problem(seed: int):
    H, w = second_moments(64, seed), weight(20, 64, seed)
    columns = torch.exp(0.5 * torch.randn(64, generator=torch.Generator().manual_seed(seed)))
    # Damped where `columns` lead, so that both damp by the same.
    feedback = Feedback.of(H, columns, 0.1)
    assert feedback is not None
    scaled = H / columns / columns[:, None]
    usable = damp(scaled, 0.1, feedback_order(scaled, "activation"))
    assert usable is not None
    rounded, _ = error_feedback(
        w * columns, usable, GRID, *GRID.fit_scale(w * columns, scaled.diagonal())
    )
    delta = ((rounded.value(GRID) - w * columns) / columns).double()
    wanted = float((delta @ H.double() * delta).sum())
    found = feedback_error([Rows.of(w, H)], columns, feedback, H, GRID)
    assert found == pytest.approx(
        wanted / float((w.double() @ H.double() * w.double()).sum()), rel=1e-3
    )


@pytest.mark.parametrize(("told", "reach"), [(False, 1.0), (True, 0.5)])
def test_scales_that_are_found_err_less_behind_feedback(told: bool, reach: float):
    """The model is one of the error: what counts is the error itself, on rows that the fit did not see."""
    ratios = []
    for seed in range(6):
        H, w = second_moments(128, seed), weight(400, 128, seed)
        if (
            told
        ):  # every second input nearly follows from six others, which have much to make up for
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(2000, 128, generator=generator)
            x[:, ::2] = x[:, ::2] * 0.2 + x[:, 1:13:2] @ torch.randn(6, 64, generator=generator)
            H = x.T @ x / len(x)
        means = w.abs().mean(dim=0)
        feedback = Feedback.of(H, 1 / means, 0.1)
        assert feedback is not None
        found = equalize([w[:300]], feedback.left(reach), 32, 8, 1 / means, same, same)
        test = [Rows(w[300:], 1.0)]
        best, even = (feedback_error(test, s, feedback, H, GRID) for s in (found, 1 / means))
        ratios.append(best / even)
    assert sum(ratios) / len(ratios) < 0.97
