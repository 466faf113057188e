"""Group scales that an FP8 engine finds again however many GPUs share the inputs of a layer.

vLLM stores no row factors: it derives them from the largest group scale of what a GPU holds of a
row, M / 448, and rounds every scale to E4M3 in units of that. With a row's inputs cut into T shards
each shard has a maximum A of its own, and a scale c · M / 448 with an E4M3 code c is found again
where 448 · c / c_A is an E4M3 value as well: three bits of mantissa allow that for every c only if
A is M times a power of two ("even"), and else only where all scales of the shard are A times powers
of two ("uniform"). Shards of T = 2 hold those of T = 4, and so on: a tree whose root is the row,
and whose cheapest assignment is found from its leaves.
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
    """The scales of least error near `wanted` [N, G] (positive) that survive a reload of whole rows,
    and of rows in so many shards, rising powers of two that divide G.

    error: what groups suffer [N, G] from scales [N, G].
    """
    ratios = [_LOW * 2 ** (i / (_SAMPLES - 1)) for i in range(_SAMPLES)]
    table = torch.stack([error(wanted * ratio) for ratio in ratios], dim=2)
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
    return Settled((best * factor).to(torch.bfloat16).float(), factor)


def movable(scale: Tensor, factor: Tensor, degrees: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Which scales [N, G] of a settled row may take another E4M3 code, every shard's factor left as
    it is, and the largest code that each may have."""
    code = e4m3(scale / factor)
    free = torch.ones_like(code, dtype=torch.bool)
    ceiling = torch.full_like(code, E4M3_MAX)
    low = factor <= FACTOR_FLOOR
    for degree in (1, *degrees):
        if code.shape[1] == degree > 1:
            continue  # a scale alone in its shard may be any maximum of it
        top = _spread(_shards(code, degree).amax(dim=2), code.shape[1])
        even = torch.frexp(top).mantissa == 0.875
        free &= low | (even & (code < top))
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


@dataclass(frozen=True)
class _Level:
    """What is known of the shards of one degree [N, T]."""

    top: Tensor
    """The even maximum of each, as a code."""
    even: Tensor
    """Least error with that maximum."""
    uniform: Tensor
    """Least error with scales of one mantissa, below the maximum of what holds the shard."""
    mantissa: Tensor
    """Which mantissa that is."""

    @property
    def least(self) -> Tensor:
        return torch.minimum(self.even, self.uniform)

    def holding(self, top: Tensor) -> Tensor:
        """What it costs more to have exactly this maximum [N, T], that of what holds the shard."""
        return torch.where(self.top == top, self.even, torch.inf) - self.least


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

    def below(top: Tensor) -> Tensor:
        return torch.where(values > _spread(top, G)[:, :, None], torch.inf, errors)

    # From the leaves: a group that holds its shard's maximum, and all others as they like it best.
    leaf = tops[-1]
    limited = below(leaf)
    held = torch.where(values[:, :, _EVEN] == _spread(leaf, G), limited[:, :, _EVEN], torch.inf)
    liked, choice = limited.min(dim=2)
    more = _shards(held - liked, degrees[-1])
    even = _shards(liked, degrees[-1]).sum(dim=2) + more.amin(dim=2)
    levels: list[_Level] = []
    for degree, top, above in zip(
        reversed(degrees), reversed(tops), reversed(tops[:-1]), strict=False
    ):
        uniform, mantissa = _shards(below(above), degree).sum(dim=2).min(dim=2)
        levels.insert(0, _Level(top, even, uniform, mantissa))
        inside = degree // above.shape[1]
        extra = levels[0].holding(above.repeat_interleave(inside, dim=1))
        even = _shards(levels[0].least, above.shape[1]).sum(dim=2) + (
            _shards(extra, above.shape[1]).amin(dim=2)
        )
    # To the leaves: which shard holds the maximum of the one above, and which are uniform (≥ 0).
    kind = torch.full_like(tops[0], -1, dtype=torch.long)
    for level, above in zip(levels, tops[:-1], strict=True):
        inside = level.top.shape[1] // above.shape[1]
        extra = level.holding(above.repeat_interleave(inside, dim=1))
        holds = _first_least(_shards(extra, above.shape[1])).flatten(1)
        own = torch.where(holds | (level.even <= level.uniform), -1, level.mantissa)
        given = kind.repeat_interleave(inside, dim=1)
        kind = torch.where(given >= 0, given, own)
    code = values.gather(2, choice[:, :, None])[:, :, 0]
    code = torch.where(_first_least(more).flatten(1), _spread(leaf, G), code)
    spread = _spread(kind, G)
    alike = values.gather(2, spread.clamp_min(0)[:, :, None])[:, :, 0]
    return torch.where(spread >= 0, alike, code), even


def _first_least(cost: Tensor) -> Tensor:
    """Where the last dimension is least, once in each row."""
    return torch.zeros_like(cost, dtype=torch.bool).scatter_(
        -1, cost.argmin(dim=-1, keepdim=True), True
    )
