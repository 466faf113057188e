"""The code books of llama.cpp's blocks: 32 inputs with a float16 scale, and of Q4_1 a minimum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantize.formats.gguf.blocks import BLOCK, KINDS, PackedBlocks
from quantize.formats.scheme import Packed
from quantize.solvers.grid import Book, Grid, importance_row

_SMALLEST = 2.0**-24
"""Least positive float16: a scale must not become zero."""
_RANGES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5)
"""Parts of a block's range that are tried as its range, about its middle."""
_REFITS = 3
"""Times that the best of them becomes the least-squares scale and minimum of its own codes."""


def block_grid(kind: str) -> Grid:
    """The grid of one type of blocks."""
    if KINDS[kind].has_minimum:
        return AffineGrid(KINDS[kind].bits, BLOCK)
    return SymmetricGrid(KINDS[kind].bits, BLOCK, signed=True)


def half(scale: Tensor) -> Tensor:
    """Scales as float16 holds them, none of them zero, in float32."""
    held = scale.clamp(-65504, 65504).to(torch.float16).float()
    least = torch.where(scale < 0, -_SMALLEST, _SMALLEST)
    return torch.where(held == 0, least, held)


@dataclass(frozen=True)
class SymmetricGrid(Grid):
    """Q4_0 and Q8_0: signed integers times a float16 scale of either sign."""

    @property
    def stored(self) -> torch.dtype:
        """float16."""
        return torch.float16

    def _representable(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        return half(scale), torch.ones_like(scale[:, :1])

    def held(self, codes: Tensor, scale: Tensor) -> Packed:
        """As blocks."""
        kind = "q4_0" if self.bits == 4 else "q8_0"
        return PackedBlocks(kind, codes.to(torch.int8), scale.to(torch.float16))

    def refit(self, codes: Tensor, value: Tensor, slope: Tensor, metric: Tensor) -> Tensor | None:
        """s = (qᵀ H w − qᵀ g) / qᵀ H q, which makes the loss of w + (s·q − w) least."""
        seen = codes @ metric
        size = (seen * codes).sum(1)
        scale = ((seen * value).sum(1) - (codes * slope).sum(1)) / size
        now = (codes * value).sum(1) / codes.square().sum(1).clamp_min(1)
        return half(torch.where(torch.isfinite(scale) & (size > 0), scale, now))


@dataclass(frozen=True)
class AffineGrid(Grid):
    """Q4_1: codes 0 … 15 times a float16 scale, plus a float16 minimum.

    Its scales are pairs: [N, G, 2] of scale and minimum.
    """

    _columns: ClassVar[int] = 2

    @property
    def stored(self) -> torch.dtype:
        """float16."""
        return torch.float16

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return 0

    @property
    def qmax(self) -> int:
        """Largest code."""
        return (1 << self.bits) - 1

    def value(self, codes: Tensor, scale: Tensor, factor: Tensor) -> Tensor:
        """Weights of `codes`; pairs broadcast against them. Float32."""
        return codes * scale[..., 0] + scale[..., 1]

    def book(self, scale: Tensor, factor: Tensor) -> Book:
        """The values of all codes under pairs [R, 2]."""
        return AffineBook(self, scale[:, 0], scale[:, 1])

    def held(self, codes: Tensor, scale: Tensor) -> Packed:
        """As blocks."""
        pairs = scale.to(torch.float16)
        return PackedBlocks(
            "q4_1", codes.to(torch.int8), pairs[..., 0].contiguous(), pairs[..., 1].contiguous()
        )

    def absmax_scale(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs by which the smallest weight of a block has code 0 and the largest code 15."""
        grouped = w.view(len(w), -1, self.group_size)
        return self._spread(grouped, 1.0), torch.ones_like(w[:, :1])

    def fit_scale(self, w: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Pairs of w [N, K] that minimise Σ importance_k·(w_k − ŵ_k)² over parts of the range, then
        over pairs with the codes kept."""
        weight = importance_row(w, importance)
        grouped, share = (t.view(len(t), -1, self.group_size) for t in (w, weight))
        best = self._spread(grouped, 1.0)
        least = torch.full_like(best[..., 0], torch.inf)
        for part in _RANGES:
            best, least = self._better_pair(
                grouped, share, self._spread(grouped, part), best, least
            )
        for _ in range(_REFITS):
            codes = self._pair_codes(grouped, best)
            fitted = self._least_squares(codes, grouped, share, best)
            best, least = self._better_pair(grouped, share, fitted, best, least)
        return best, torch.ones_like(w[:, :1])

    def scale_moves(self, scale: Tensor, factor: Tensor, sweep: int) -> tuple[Tensor, Tensor]:
        """Smaller and larger scales about the same middle code."""
        moved = []
        for d in super().scale_moves(scale[..., 0], factor, sweep):
            middle = (self.qmax / 2) * (scale[..., 0] - d)
            moved.append(_pair(d, scale[..., 1] + middle))
        return moved[0], moved[1]

    def refit(self, codes: Tensor, value: Tensor, slope: Tensor, metric: Tensor) -> Tensor | None:
        """The pair that makes the loss of w + (d·q + m − w) least: two equations in d and m."""
        seen, total = codes @ metric, metric.sum(0)
        a = (seen * codes).sum(1)
        b = (codes * total).sum(1)
        c = total.sum()
        p = (seen * value).sum(1) - (codes * slope).sum(1)
        q = (value * total).sum(1) - slope.sum(1)
        return _solved(a, b, c.expand_as(a), p, q, codes, value)

    def _spread(self, grouped: Tensor, part: float) -> Tensor:
        low, high = grouped.amin(dim=2), grouped.amax(dim=2)
        middle, reach = (low + high) / 2, (high - low) / 2 * part
        return _pair(2 * reach / self.qmax, middle - reach)

    def _pair_codes(self, grouped: Tensor, pair: Tensor) -> Tensor:
        d, m = pair[..., :1], pair[..., 1:]
        return ((grouped - m) / d).round_().clamp_(self.qmin, self.qmax)

    def _better_pair(
        self, grouped: Tensor, share: Tensor, pair: Tensor, best: Tensor, least: Tensor
    ) -> tuple[Tensor, Tensor]:
        values = self._pair_codes(grouped, pair).mul_(pair[..., :1]).add_(pair[..., 1:])
        error = values.sub_(grouped).square_().mul_(share).sum(dim=2)
        better = error < least
        return torch.where(better[..., None], pair, best), torch.where(better, error, least)

    def _least_squares(self, codes: Tensor, grouped: Tensor, share: Tensor, best: Tensor) -> Tensor:
        seen = codes * share
        a, b = (seen * codes).sum(2), seen.sum(2)
        c = share.sum(2).expand_as(a)
        p, q = (seen * grouped).sum(2), (grouped * share).sum(2)
        return _solved(a, b, c, p, q, codes, grouped)


@dataclass(frozen=True)
class AffineBook(Book):
    """Values d·q + m of one group of R rows."""

    minimum: Tensor

    def round(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest codes of w [M, R] → (codes, values)."""
        codes = ((w - self.minimum) / self.step).round_().clamp_(self.grid.qmin, self.grid.qmax)
        return codes, self.value(codes)

    def value(self, codes: Tensor) -> Tensor:
        """Values of codes [M, R], float32."""
        return codes * self.step + self.minimum


def _pair(d: Tensor, m: Tensor) -> Tensor:
    return torch.stack([half(d), m.clamp(-65504, 65504).to(torch.float16).float()], dim=-1)


def _solved(
    a: Tensor, b: Tensor, c: Tensor, p: Tensor, q: Tensor, codes: Tensor, value: Tensor
) -> Tensor:
    """Pairs of [a b; b c][d m]ᵀ = [p q]ᵀ; where codes are all alike, m alone is fitted."""
    determinant = a * c - b * b
    usable = determinant > 1e-6 * a * c
    d = torch.where(usable, (p * c - q * b) / determinant, 0.0)
    # One code alone: any scale does, and the minimum takes the rest.
    d = torch.where(usable & torch.isfinite(d) & (d != 0), d, half(value.abs().amax(-1)))
    d = half(d)
    m = torch.where(c > 0, (q - b * d) / c, value.mean(-1))
    return _pair(d, m)
