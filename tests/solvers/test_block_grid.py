"""The grids of llama.cpp's blocks: what is fitted is what is stored, and descent loses nothing."""

from __future__ import annotations

import gguf
import pytest
import torch
from gguf.quants import dequantize, quantize
from torch import Tensor

from quantize.formats.gguf.blocks import KINDS
from quantize.solvers.block_grid import block_grid
from quantize.solvers.feedback import damp, descend, error_feedback, feedback_order, loss

N, K = 24, 96


def inputs() -> Tensor:
    """A Hessian [K, K] of inputs that depend on each other."""
    mix = torch.randn(K, K) * torch.rand(K, 1).square()
    x = torch.randn(4 * K, K) @ mix
    return x.T @ x / len(x)


@pytest.mark.parametrize("kind", KINDS)
def test_stored_values_are_those_that_were_fitted(kind: str):
    w, grid = torch.randn(N, K) + 0.3, block_grid(kind)
    scale, factor = grid.fit_scale(w, torch.rand(K) + 0.1)
    codes, values = grid.round(w, scale, factor)
    packed = grid.held(codes, scale)
    assert torch.allclose(packed.unpack(), values, rtol=0, atol=1e-6)
    assert packed.scheme(False).kind == kind  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_nearer_than_llama_cpps(kind: str):
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(N, K, generator=generator) * torch.rand(N, 1, generator=generator)
    grid = block_grid(kind)
    scale, factor = grid.fit_scale(w)
    ours = (grid.round(w, scale, factor)[1] - w).square().sum()
    number = gguf.GGMLQuantizationType(KINDS[kind].number)
    theirs = torch.from_numpy(dequantize(quantize(w.numpy(), number), number))
    limit = {"q4_0": 0.93, "q4_1": 0.9, "q8_0": 1.0}[kind]
    assert ours < limit * (theirs - w).square().sum()


@pytest.mark.parametrize("kind", KINDS)
def test_odd_blocks_are_held(kind: str):
    w = torch.zeros(4, 64)
    w[1] = 0.25  # one value alone
    w[2, :32] = 1e-9  # below what float16 holds
    w[3, 0] = 3.0
    grid = block_grid(kind)
    scale, factor = grid.fit_scale(w)
    values = grid.held(grid.round(w, scale, factor)[0], scale).unpack()
    assert torch.isfinite(values).all()
    assert (values - w).abs().max() < 0.02
    assert torch.equal(values[0], w[0])


@pytest.mark.parametrize("kind", ["q4_0", "q4_1"])
def test_descent_from_feedback_only_gains(kind: str):
    w, H, grid = torch.randn(N, K), inputs(), block_grid(kind)
    usable = damp(H, 0.01, feedback_order(H, "activation"))
    assert usable is not None
    scale, factor = grid.fit_scale(w, H.diagonal())
    fed, _ = error_feedback(w, usable, grid, scale, factor)
    with usable.metric(H) as metric:
        before = loss(w, fed, metric, grid)
        ended = descend(w, fed, metric, grid, 4)
        after = loss(w, ended, metric, grid)
        nearest, _ = error_feedback(w, usable, grid, *grid.absmax_scale(w))
        assert after.sum() < before.sum()
        assert after.sum() < loss(w, nearest, metric, grid).sum()
    values = ended.value(grid)
    assert torch.allclose(grid.held(ended.codes, ended.scale).unpack(), values, rtol=0, atol=1e-6)


def test_a_refit_is_the_least_squares_solution():
    """Of a minimum and a scale under the metric, solved in double precision."""
    H = inputs()[:32, :32]
    grid = block_grid("q4_1")
    codes, value = torch.randint(0, 16, (5, 32)).float(), torch.randn(5, 32)
    slope = torch.randn(5, 32) * 0.1
    found = grid.refit(codes, value, slope, H)
    assert found is not None
    for row in range(5):
        basis = torch.stack([codes[row], torch.ones(32)]).double()
        left = basis @ H.double() @ basis.T
        right = basis @ (H.double() @ value[row].double() - slope[row].double())
        wanted = torch.linalg.solve(left, right)
        assert torch.allclose(found[row].double(), wanted, rtol=2e-3, atol=2e-3)
