"""Pieces of scale searches over the edges of a block."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from quantize.block.block import Block
from quantize.model.arch import Edge
from quantize.solvers.equalization import Rows
from quantize.solvers.grid import Grid
from quantize.solvers.products import quadratic

SAMPLED_ROWS = 512
"""Rows of one sink that a search tries: a sample ranks candidates in a part of the time."""
ALL_SAMPLED_ROWS = 4096
"""Rows that a search tries, of all sinks together: a norm may feed dozens of experts."""


def column_absmean(block: Block, edge: Edge) -> Tensor:
    """Mean magnitude [K] of the input columns over the rows of all sinks that are rounded."""
    weights = [block.linear(sink).weight for sink in block.rounded_sinks(edge)]
    total = torch.stack([weight.float().abs().sum(dim=0) for weight in weights]).sum(dim=0)
    return total / sum(len(weight) for weight in weights)


def per_source_channel(block: Block, edge: Edge, columns: Tensor) -> Tensor:
    """Average a statistic of sink input columns [K] over the columns that
    read the same source channel."""
    if not edge.kv_group:
        return columns
    return columns.view(block.shape.n_kv_heads, -1, block.shape.head_dim).mean(dim=1).flatten()


def source_sizes(block: Block, edge: Edge, columns: Tensor) -> Tensor:
    """Sizes of sink input columns [K] per source channel, none below a ten-thousandth of their mean:
    a scale divides by them, and a dead channel has none."""
    least = 1e-4 * float(columns.mean()) + 1e-30
    return per_source_channel(block, edge, columns).clamp_min(least)


def balance(scale: Tensor) -> Tensor:
    """Scale λ so that its geometric mid-range is 1; channels without a finite positive λ get 1."""
    scale = torch.where(torch.isfinite(scale) & (scale > 0), scale, torch.ones_like(scale))
    return scale / (scale.max() * scale.min()).sqrt()


def sampled_rows(block: Block, edge: Edge, hessian: Tensor) -> dict[str, Rows]:
    """A sample of every rounded sink's rows, each sink counted relative to what it puts out.

    Rows are quantized alike: a sample of them ranks scales as well as all would, at a fraction of the
    cost. hessian: E[x xᵀ] of the sinks' input.
    """
    weights = {sink: block.linear(sink).weight for sink in block.rounded_sinks(edge)}
    most = min(SAMPLED_ROWS, ALL_SAMPLED_ROWS // len(weights) or 1)
    return {
        sink: Rows.of(weight[:: max(1, len(weight) // most)].float(), hessian)
        for sink, weight in weights.items()
    }


def rounding_error(
    sinks: Iterable[Rows], columns: Tensor, hessian: Tensor, grid: Grid, clip: bool
) -> float:
    """Output error, summed over rows by their share, of rounding W·diag(columns) to nearest.

    hessian: E[x xᵀ] of the sinks' input before λ moves into it. Exactly the mean squared output
    error that a forward pass would measure, without the pass.
    """
    total = 0.0
    for sink in sinks:
        weight = sink.weight
        scaled = weight * columns
        importance = hessian.diagonal() / columns.square()
        scale, factor = grid.fit_scale(scaled, importance) if clip else grid.absmax_scale(scaled)
        delta = grid.round(scaled, scale, factor)[1] / columns - weight
        total += sink.share * float(quadratic(delta, hessian).sum())
    return total


def search(
    block: Block,
    edge: Edge,
    candidates: Iterable[Tensor],
    hessian: Tensor,
    grid: Grid,
    clip: bool = False,
) -> tuple[Tensor | None, float]:
    """Best λ among `candidates` (per source channel) by `rounding_error`, and
    its error relative to λ = 1.

    λ is None, and the ratio 1, when nothing beats leaving the edge alone.
    """
    sinks = list(sampled_rows(block, edge, hessian).values())
    plain = rounding_error(sinks, torch.ones_like(hessian.diagonal()), hessian, grid, clip)
    best, lowest = None, plain

    def error_with(candidate: Tensor) -> float:
        return rounding_error(sinks, block.sink_columns(edge, candidate), hessian, grid, clip)

    tried = list(candidates)
    errors = block.ranks.numbers([partial(error_with, candidate) for candidate in tried])
    for candidate, error in zip(tried, errors, strict=True):
        if error < lowest:
            best, lowest = candidate, error
    return best, lowest / plain if plain else 1.0
