"""Group scales under which an FP8 engine multiplies the same weights however many GPUs share the
inputs of a layer.

vLLM stores no row factors: it derives them from the largest group scale of what a GPU holds of a
row, M / 448, rounds every scale to E4M3 in units of that, and multiplies E4M3(q · scale) in the same
units. With a row's inputs cut into shards, each has a maximum of its own. Where that is M times a
power of two, all those roundings are the same: E4M3 values times powers of two are E4M3 values. (Any
other maximum leaves few scales that are found again, and other products of all.) So of every shard
one scale is moved to such a value and the others stay below it, which costs some percent of the
rounding error; the row's own M is chosen by what all of that costs.

Shards of two GPUs hold those of four, and so on, and the nearest power of two rises with a maximum:
a shard's is that of one inside it, and only the smallest shards need looking at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.formats.fp8 import E4M3_MAX, FACTOR_FLOOR, e4m3, row_factor

_LOW = 0.75
"""A scale may become this much of what was wanted, and less than twice that: a scale too small clips
and costs more than one too large."""
_SAMPLES = 17
"""Scales in that octave at which a group's error is measured; between them it is interpolated."""
_TOPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.76)
"""Largest scales of a row that are tried, in parts of the wanted one: whatever it is, all other
maxima must be powers of two below it."""
_MANTISSAS = range(8, 16)
_EVEN = 14 - 8  # 448 is 14/8 · 2⁸: where it stands among the mantissas
_LEAST_EXPONENT = -6  # of E4M3's normal values


@dataclass(frozen=True)
class Settled:
    """Scales that every shard derives again."""

    scale: Tensor
    """[N, G], bfloat16 values in float32."""
    factor: Tensor
    """Row factor [N, 1]."""


def settle(wanted: Tensor, error: Callable[[Tensor], Tensor], degrees: Sequence[int]) -> Settled:
    """The scales of least error near `wanted` [N, G] that survive a reload of whole rows
    and of rows in so many shards: rising powers of two (see `shard_counts`). Each keeps its sign.

    error: what groups suffer [N, G] from scales [N, G].
    """
    ratios = [_LOW * 2 ** (i / (_SAMPLES - 1)) for i in range(_SAMPLES)]
    table = torch.stack([error(wanted * ratio) for ratio in ratios], dim=2)
    signed, wanted = wanted, wanted.abs()
    largest = wanted.amax(dim=1, keepdim=True)
    power = torch.exp2(torch.ceil(torch.log2(largest * _LOW)))
    best = torch.empty_like(wanted)
    factor = torch.empty_like(largest)
    least = torch.full_like(largest, torch.inf)
    # A shard below the floor has the floor's factor: of a row above it, only powers of two are
    # multiples of that.
    smallest = _shards(wanted, degrees[-1]).amax(dim=2).amin(dim=1, keepdim=True)
    mixed = smallest * _LOW < 2 * FACTOR_FLOOR * E4M3_MAX
    for top in (power, *(largest * part for part in _TOPS)):
        top = top.to(torch.bfloat16).float()
        found = row_factor(top)
        code, cost = _assign(wanted / found, table, degrees)
        cost = torch.where(mixed & (top != power), torch.inf, cost)
        better = cost < least
        best = torch.where(better, code, best)
        factor = torch.where(better, found, factor)
        least = torch.where(better, cost, least)
    low = largest < FACTOR_FLOOR * E4M3_MAX  # whole rows below it have one factor, and so no tree
    floor = torch.full_like(factor, FACTOR_FLOOR)
    factor = torch.where(low, floor, factor)
    plain = e4m3(wanted / factor).clamp_min(2.0**-9)
    best = torch.where(low, plain, best)
    return Settled((best * factor).copysign(signed).to(torch.bfloat16).float(), factor)


def movable(scale: Tensor, factor: Tensor, degrees: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Which scales [N, G] of a settled row may take another E4M3 code, every shard's factor left as
    it is, and the largest magnitude of a code that each may have."""
    code = e4m3(scale.abs() / factor)
    free = torch.ones_like(code, dtype=torch.bool)
    ceiling = torch.full_like(code, E4M3_MAX)
    low = factor <= FACTOR_FLOOR
    for degree in (1, *degrees):
        top = _spread(_shards(code, degree).amax(dim=2), code.shape[1])
        free &= low | (code < top)
        ceiling = torch.where(low, ceiling, torch.minimum(ceiling, top))
    return free, ceiling


def _shards(groups: Tensor, degree: int) -> Tensor:
    """[N, G, …] → [N, degree, G / degree, …]."""
    return groups.reshape(len(groups), degree, -1, *groups.shape[2:])


def _spread(of_shards: Tensor, groups: int) -> Tensor:
    """A value for each shard [N, T] → one for each group [N, G]."""
    return of_shards.repeat_interleave(groups // of_shards.shape[1], dim=1)


def _near(wanted: Tensor, mantissa: Tensor | float) -> Tensor:
    """The E4M3 value of this mantissa, in 1 … 2, in `_LOW` … 2 · `_LOW` times what is wanted."""
    exponent = torch.ceil(torch.log2(wanted * _LOW / mantissa)).clamp_min(_LEAST_EXPONENT)
    return torch.exp2(exponent) * mantissa


def _looked_up(table: Tensor, ratio: Tensor) -> Tensor:
    """Errors [N, G, C] at ratios [N, G, C] of what is wanted, from those of `_SAMPLES` of them."""
    place = (torch.log2(ratio / _LOW) * (_SAMPLES - 1)).clamp(0, _SAMPLES - 1)
    below = place.floor().clamp_max(_SAMPLES - 2)
    left, right = (table.gather(2, below.long() + step) for step in (0, 1))
    return left + (right - left) * (place - below)


def _assign(wanted: Tensor, table: Tensor, degrees: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Codes [N, G] and their error [N, 1], with the largest code of a row 448 and all in units of
    what that stands for."""
    G = wanted.shape[1]
    steps = torch.tensor([m / 8 for m in _MANTISSAS], device=wanted.device)
    values = _near(wanted[:, :, None], steps)
    errors = _looked_up(table, values / wanted[:, :, None])
    tops = [
        _near(_shards(wanted, degree).amax(dim=2), 1.75).clamp_max(E4M3_MAX)
        for degree in (1, *degrees)
    ]
    # From the leaves: what it costs that one group of a shard has exactly its maximum, beside that
    # all have what they like best. Maxima fall from a shard to those inside it, so one that holds
    # the maximum of the shard around it is one that has the same.
    leaf = _spread(tops[-1], G)
    liked, choice = torch.where(values > leaf[:, :, None], torch.inf, errors).min(dim=2)
    holding = torch.where(values[:, :, _EVEN] == leaf, errors[:, :, _EVEN], torch.inf) - liked
    cost = _shards(holding, tops[-1].shape[1]).amin(dim=2)
    held = _first_least(_shards(holding, tops[-1].shape[1])).flatten(1)
    code = torch.where(held, leaf, values.gather(2, choice[:, :, None])[:, :, 0])
    return code, (liked.sum(dim=1) + cost.sum(dim=1))[:, None]


def _first_least(cost: Tensor) -> Tensor:
    """Where the last dimension is least, once in each row."""
    return torch.zeros_like(cost, dtype=torch.bool).scatter_(
        -1, cost.argmin(dim=-1, keepdim=True), True
    )
