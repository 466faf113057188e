from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quantize.solvers.feedback import (
    Rounded,
    damp,
    descend,
    error_feedback,
    feedback_order,
    loss,
    undamped,
)
from quantize.solvers.grid import Grid
from quantize.solvers.target import corrected_target

PLAIN = Grid(4, 128)
SIGNED = Grid(4, 128, signed=True)
PRODUCT = Grid(4, 128, product=True)
KERNEL = Grid(4, 128, product=True, fp8_scales=True)
SIGNED_KERNEL = replace(KERNEL, signed=True)
GRIDS = pytest.mark.parametrize(
    "grid",
    [
        PLAIN,
        SIGNED,
        PRODUCT,
        KERNEL,
        SIGNED_KERNEL,
        Grid(3, 32),
        Grid(2, 64, signed=True),
        Grid(8, 128),
    ],
    ids=str,
)


def weight(N: int = 8, K: int = 256, seed: int = 0, size: float = 0.02) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (
        size
        * torch.randn(N, K, generator=generator)
        * (0.5 + torch.rand(N, 1, generator=generator))
    )


def correlated_hessian(K: int = 256, seed: int = 0, tokens: int = 600) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(K, K, generator=generator) * K**-0.5 + 0.5 * torch.eye(K)
    x = torch.randn(tokens, K // 4, generator=generator) @ mix[: K // 4] + 0.1 * torch.randn(
        tokens, K, generator=generator
    )
    x = x * (0.2 + 3 * torch.rand(K, generator=generator) ** 3)
    return x.T @ x / tokens


def rounded(w: Tensor, grid: Grid) -> Rounded:
    scale, factor = grid.fit_scale(w)
    return Rounded(grid.round(w, scale, factor)[0], scale, factor)


# Grid


@GRIDS
def test_nearest_is_the_best_of_all_codes(grid: Grid):
    w = 1.4 * weight()  # some weights lie outside the grid
    scale, factor = grid.absmax_scale(w / 1.4)
    if grid.signed:
        scale = scale * torch.where(torch.arange(scale.shape[1]) % 2 == 0, 1.0, -1.0)
    per_input = grid.expand(scale)
    codes, values = grid.round(w, scale, factor)
    assert torch.equal(grid.value(codes, per_input, factor), values)
    assert torch.equal(codes, codes.round())
    assert grid.qmin <= int(codes.min())
    assert int(codes.max()) <= grid.qmax
    book = torch.stack(
        [
            grid.value(torch.full_like(w, q), per_input, factor)
            for q in range(grid.qmin, grid.qmax + 1)
        ]
    )
    best = (book - w).abs().amin(dim=0)
    assert torch.allclose((values - w).abs(), best, rtol=0, atol=1e-9)


def test_nearest_is_found_under_every_scale_that_e4m3_has():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    codes = codes[codes.isfinite() & (codes > 0)]
    grid, factor = PRODUCT, torch.full_like(codes, 0.37)
    book = grid.book(codes * factor, factor)
    levels = grid.value(torch.arange(-8.0, 8.0)[:, None], codes * factor, factor)
    span = levels[-1] - levels[0]
    w = torch.rand(4001, 1, generator=torch.Generator().manual_seed(2)) * 1.2 - 0.1
    w = levels[0] + w * span
    found, values = book.round(w)
    assert torch.equal(values, book.value(found))
    nearest = (w[None] - levels[:, None]).abs().amin(dim=0)
    assert torch.allclose((values - w).abs(), nearest, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("signed", [False, True])
def test_fitted_scales_never_lose_to_absmax(bits: int, weighted: bool, signed: bool):
    grid, w = Grid(bits, 64, signed=signed), weight()
    importance = (
        torch.rand(256, generator=torch.Generator().manual_seed(1)) ** 4 if weighted else None
    )

    def error(scale: Tensor, factor: Tensor) -> Tensor:
        return grid.group_error(
            w, scale, factor, torch.ones_like(w[:1]) if importance is None else importance[None]
        )

    fitted, plain = error(*grid.fit_scale(w, importance)), error(*grid.absmax_scale(w))
    assert (fitted <= plain).all()
    if bits < 8:
        assert float(fitted.sum()) < 0.99 * float(plain.sum())


@pytest.mark.parametrize("fp8", [False, True])
def test_scales_are_what_the_checkpoint_holds(fp8: bool):
    grid = Grid(4, 128, product=fp8, fp8_scales=fp8)
    for scale, factor in (grid.absmax_scale(weight()), grid.fit_scale(weight())):
        assert scale.shape == (8, 2)
        assert factor.shape == (8, 1)
        assert torch.equal(scale.to(torch.bfloat16).float(), scale)
        assert (scale > 0).all()


@GRIDS
def test_zero_groups_give_zero_codes_and_finite_scales(grid: Grid):
    w = weight()
    w[1, : grid.group_size], w[2] = 0, 0
    for scale, factor in (grid.absmax_scale(w), grid.fit_scale(w)):
        assert torch.isfinite(scale).all()
        assert (grid.round(w, scale, factor)[1][w == 0] == 0).all()


@pytest.mark.parametrize("size", [1e-1, 1e-3, 1e-5])
def test_a_zero_group_does_not_spoil_the_rest_of_its_row(size: float):
    w = weight(K=256, size=size)
    w[:, 128:] = 0
    alone = w[:, :128]
    errors = []
    for part in (w, alone):
        r = rounded(part, KERNEL)
        errors.append(float((r.value(KERNEL)[:, :128] - alone).norm() / alone.norm()))
    assert errors[0] <= 1.05 * errors[1]


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_error_falls_as_bits_rise(size: float):
    w, grids = weight(size=size), [Grid(bits, 64) for bits in range(2, 9)]
    errors = [float((rounded(w, grid).value(grid) - w).norm()) for grid in grids]
    assert all(high > 1.7 * low for high, low in itertools.pairwise(errors))


@pytest.mark.parametrize("grid", [PLAIN, SIGNED, KERNEL, SIGNED_KERNEL], ids=str)
def test_neighbour_scales_are_storable_and_keep_the_rows_factor_and_signs(grid: Grid):
    scale, factor = grid.fit_scale(weight())
    assert bool((scale < 0).any()) == grid.signed
    for other in (moved for sweep in range(4) for moved in grid.scale_moves(scale, factor, sweep)):
        assert torch.equal(other.to(torch.bfloat16).float(), other)
        assert torch.equal(other.sign(), scale.sign())
        if grid.fp8_scales:
            assert torch.equal(other.abs().amax(dim=1), scale.abs().amax(dim=1))


# Error feedback


def textbook_gptq(
    w: Tensor, H: Tensor, order: Tensor, amount: float, grid: Grid, scale: Tensor
) -> Tensor:
    """Optimal Brain Quantization one column at a time, inverse updated by elimination, all in float64."""
    K = len(H)
    H = H.double() + amount * H.double().diagonal().mean() * torch.eye(K, dtype=torch.float64)
    inverse, w, codes = (
        torch.linalg.inv(H),
        w.double().clone(),
        torch.zeros_like(w, dtype=torch.float64),
    )
    for j in order.tolist():
        s = scale[:, j // grid.group_size].double()
        codes[:, j] = (w[:, j] / s).round().clamp(grid.qmin, grid.qmax)
        error = (w[:, j] - codes[:, j] * s) / inverse[j, j]
        w -= torch.outer(error, inverse[j])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


@pytest.mark.parametrize("order_name", ["natural", "activation"])
def test_error_feedback_is_textbook_gptq(order_name: str):
    H, w, grid = correlated_hessian(160), weight(8, 160), Grid(4, 32)
    order = feedback_order(H, "natural" if order_name == "natural" else "activation")
    d = damp(H, 0.01, order)
    assert d is not None
    assert d.damping == 0.01
    scale, factor = grid.absmax_scale(w)
    codes = error_feedback(w, d, grid, scale, factor)[0].codes
    expected = textbook_gptq(w, H, order, 0.01, grid, scale)
    # A float32 tie may fall the other way, and then that row's later columns differ.
    same_rows = (codes == expected).all(dim=1)
    assert int(same_rows.sum()) >= 7
    assert float((codes == expected).float().mean()) > 0.95


@GRIDS
def test_weights_need_not_lie_row_by_row(grid: Grid):
    """As those of experts that a model stores transposed."""
    w = weight(6, 256, seed=5)
    by_columns = w.T.contiguous().T
    for fit in (grid.fit_scale, grid.absmax_scale):
        found, same = fit(w), fit(by_columns)
        assert all(torch.equal(a, b) for a, b in zip(found, same, strict=True))
        pairs = zip(grid.round(w, *found), grid.round(by_columns, *found), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_a_scale_of_zero_makes_all_values_zero():
    w = weight(4, 256)
    scale, factor = KERNEL.fit_scale(w)
    scale[1, 0] = 0
    codes, values = KERNEL.round(w, scale, factor)
    assert codes.isfinite().all()
    assert (values[1, :128] == 0).all()


@GRIDS
@pytest.mark.parametrize("damping", [0.01, 0.5])
def test_error_feedback_knows_what_it_lost(grid: Grid, damping: float):
    H, w = correlated_hessian(seed=3), weight(12, seed=3)
    H[:, [7, 130]] = H[[7, 130]] = 0
    d = damp(H, damping, feedback_order(H, "activation"))
    assert d is not None
    fed, lost = error_feedback(w, d, grid, *grid.fit_scale(w))
    delta = (fed.value(grid) - w).double()
    with d.metric(H) as metric:
        live = delta.masked_fill(d.dead, 0)
        assert torch.allclose(lost.double(), (live @ metric.double() * live).sum(1), rtol=1e-4)
    exact = (delta @ H.double() * delta).sum(1)
    assert torch.allclose(undamped(lost, delta.float(), d).double(), exact, rtol=1e-3)


def test_activation_order_visits_the_largest_inputs_first():
    H = torch.diag(torch.tensor([1.0, 5.0, 3.0, 5.0]))
    assert feedback_order(H, "activation").tolist() == [1, 3, 2, 0]
    assert feedback_order(H, "natural").tolist() == [0, 1, 2, 3]


@GRIDS
def test_error_feedback_without_correlation_is_rounding(grid: Grid):
    H = torch.diag(0.1 + torch.rand(256, generator=torch.Generator().manual_seed(2)))
    w = weight()
    d = damp(H, 0.01, feedback_order(H, "activation"))
    assert d is not None
    plain = rounded(w, grid)
    assert torch.equal(error_feedback(w, d, grid, plain.scale, plain.factor)[0].codes, plain.codes)


@pytest.mark.parametrize("grid", [PLAIN, SIGNED, KERNEL, SIGNED_KERNEL, Grid(2, 64)], ids=str)
@pytest.mark.parametrize("order_name", ["natural", "activation"])
def test_error_feedback_beats_rounding_on_correlated_inputs(grid: Grid, order_name: str):
    H, w = correlated_hessian(), weight(32)
    d = damp(H, 0.01, feedback_order(H, "natural" if order_name == "natural" else "activation"))
    assert d is not None
    plain = rounded(w, grid)
    better, _ = error_feedback(w, d, grid, plain.scale, plain.factor)
    assert float(loss(w, better, H, grid).sum()) < 0.8 * float(loss(w, plain, H, grid).sum())


def test_error_feedback_leaves_its_arguments_alone():
    H, w = correlated_hessian(), weight()
    kept_h, kept_w = H.clone(), w.clone()
    d = damp(H, 0.01, feedback_order(H, "activation"))
    assert d is not None
    plain = rounded(w, KERNEL)
    descend(w, error_feedback(w, d, KERNEL, plain.scale, plain.factor)[0], H, KERNEL, 1)
    assert torch.equal(H, kept_h)
    assert torch.equal(w, kept_w)


# Descent


@settings(deadline=None, max_examples=12)
@given(
    st.integers(0, 10**6),
    st.sampled_from([PLAIN, SIGNED, PRODUCT, KERNEL, SIGNED_KERNEL, Grid(2, 64)]),
)
def test_descent_never_climbs(seed: int, grid: Grid):
    w, H = weight(6, 256, seed), correlated_hessian(256, seed, tokens=300)
    H.diagonal().add_(0.01 * H.diagonal().mean())
    current = rounded(w, grid)
    before = loss(w, current, H, grid)
    for _ in range(3):
        current = descend(w, current, H, grid, 1)
        after = loss(w, current, H, grid)
        assert (after <= before * (1 + 1e-4) + 1e-12).all()
        before = after
    assert float(before.sum()) < 0.95 * float(loss(w, rounded(w, grid), H, grid).sum())
    assert grid.qmin <= int(current.codes.min())
    assert int(current.codes.max()) <= grid.qmax
    assert torch.equal(current.scale.to(torch.bfloat16).float(), current.scale)


@pytest.mark.parametrize("rows", [1, 8])
def test_descent_leaves_what_it_begins_with_alone(rows: int):
    w, H = weight(rows), correlated_hessian()
    begun = rounded(w, SIGNED)
    codes, scale = begun.codes.clone(), begun.scale.clone()
    ended = descend(w, begun, H, SIGNED, 2)
    assert not torch.equal(ended.codes, codes)
    assert torch.equal(begun.codes, codes)
    assert torch.equal(begun.scale, scale)


def test_descent_keeps_what_the_kernel_re_derives():
    w, H = weight(16), correlated_hessian()
    r = descend(w, rounded(w, KERNEL), H, KERNEL, 3)
    assert torch.equal(KERNEL.pack(r.codes, r.scale).kernel_weight(), r.value(KERNEL))


# Targets and damping


@pytest.mark.parametrize("with_residual", [False, True])
def test_corrected_target_is_least_squares(with_residual: bool):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 32, generator=generator, dtype=torch.float64)
    drift = torch.rand(32, 32, generator=generator, dtype=torch.float64)
    seen = x + 0.2 * torch.randn(500, 32, generator=generator, dtype=torch.float64) @ drift
    w = torch.randn(4, 32, generator=generator, dtype=torch.float64)
    missing = (x[:, :4] - seen[:, 4:8]) * with_residual  # what the residual stream lacks
    H, cross, delta = seen.T @ seen / 500, x.T @ seen / 500, 0.05
    wanted = (x @ w.T + missing).T @ seen / 500
    # min ‖x Wᵀ + (r − r̂) − x̂ Vᵀ‖² + δ‖V − W‖² as one stacked system.
    ridge = math.sqrt(delta * float(H.diagonal().mean()) * 500)
    stacked = torch.cat([seen, ridge * torch.eye(32, dtype=torch.float64)])
    expected = torch.linalg.lstsq(stacked, torch.cat([x @ w.T + missing, ridge * w.T])).solution.T
    known = (None, wanted.float()) if with_residual else (cross.float(), None)
    usable = damp(H.float(), delta, feedback_order(H.float(), "activation"))
    assert usable is not None
    out, share = corrected_target(w.float(), H.float(), *known, usable)
    assert share == 1
    assert torch.allclose(out.double(), expected, atol=2e-5)


def test_without_drift_the_target_is_the_weight():
    H, w = correlated_hessian(), weight()
    usable = damp(H, 0.01, feedback_order(H, "activation"))
    assert usable is not None
    assert torch.equal(corrected_target(w, H, H, None, usable)[0], w)


@pytest.mark.parametrize("damping", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("spread", [1.0, 1e3])
def test_the_factor_is_that_of_float64_however_ill_conditioned(damping: float, spread: float):
    """One direction has nearly all of the energy, and there are fewer tokens than inputs."""
    draw = torch.Generator().manual_seed(torch.seed() % 2**31)
    x = torch.randn(150, 256, generator=draw)
    x[:, 5] *= spread
    x += x[:, 5:6] * torch.randn(256, generator=draw)
    H = x.T @ x / len(x)
    d = damp(H, damping, feedback_order(H, "activation"))
    assert d is not None
    assert d.damping == damping
    whole = H.double() + damping * float(H.double().diagonal().mean()) * torch.eye(256)
    wanted = torch.linalg.cholesky(whole[d.order][:, d.order].inverse(), upper=True)
    assert float((d.inverse_factor - wanted).norm() / wanted.norm()) < 1e-3


def test_damping_grows_until_a_singular_hessian_factors():
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    H = x.T @ x
    d = damp(H - 1e-3 * H.diagonal().mean() * torch.eye(64), 1e-6, torch.arange(64))
    assert d is not None
    assert d.damping > 1e-6
    assert torch.isfinite(d.inverse_factor).all()
    U = d.inverse_factor
    assert torch.equal(U, U.triu())


def test_dead_inputs_get_the_code_zero():
    H = correlated_hessian()
    dead = [3, 130]
    H[dead, :] = 0
    H[:, dead] = 0
    order = feedback_order(H, "activation")
    d = damp(H, 0.01, order)
    assert d is not None
    assert d.dead.nonzero().flatten().tolist() == dead
    plain = rounded(weight(), PLAIN)
    codes = error_feedback(weight(), d, PLAIN, plain.scale, plain.factor)[0].codes
    assert (codes[:, dead] == 0).all()


def test_the_inverse_and_the_metric_are_damped_alike_however_many_inputs_are_dead():
    H = correlated_hessian()
    live = torch.arange(0, 256, 4)
    dead = torch.ones(256, dtype=torch.bool).index_fill(0, live, False)
    H[dead, :] = 0
    H[:, dead] = 0
    before = H.clone()
    d = damp(H, 0.1, feedback_order(H, "activation"))
    assert d is not None
    assert d.delta == pytest.approx(0.1 * float(H.diagonal()[live].mean()))
    inverse = torch.empty(256, 256, dtype=torch.float64)
    U = d.inverse_factor.double()
    inverse[d.order[:, None], d.order] = U.T @ U
    factored = torch.linalg.inv(inverse)[live[:, None], live].float()
    with d.metric(H) as metric:
        torch.testing.assert_close(metric[live[:, None], live], factored, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(metric - before, d.delta * torch.eye(256))
    assert torch.equal(H, before)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_hessian_that_cannot_be_used_gives_none(broken: float):
    H = correlated_hessian()
    assert damp(torch.zeros_like(H), 0.01, torch.arange(256)) is None
    assert damp(-H, 0.01, torch.arange(256)) is None
    H[5, 5] = broken
    assert torch.equal(feedback_order(H, "activation"), torch.arange(256))
    assert damp(H, 0.01, torch.arange(256)) is None


# What an accelerator would wait for


class HostReads(TorchDispatchMode):
    """Counts how often a value is fetched to the host, which on an accelerator waits for all work before it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        self.count += func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.equal.default,
        )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("grid", [SIGNED, KERNEL], ids=str)
def test_loops_over_columns_wait_for_nobody(grid: Grid):
    reads = []
    for K in (128, 512):
        H, w = correlated_hessian(K), weight(K=K)
        d = damp(H, 0.01, feedback_order(H, "activation"))
        assert d is not None
        with HostReads() as mode:
            scale, factor = grid.fit_scale(w, H.diagonal())
            fitted, _ = error_feedback(w, d, grid, scale, factor)
            descend(w, fitted, H, grid, 2)
        reads.append(mode.count)
    assert reads[0] == reads[1] <= 3  # the loss before, and after each sweep
