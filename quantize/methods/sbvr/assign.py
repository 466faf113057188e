"""Which line of an SBVR codebook suits which group of a weight, and the
codes of the weights under it.

A group's squared error under every line of a codebook comes out of one matrix product: a group
becomes a histogram over fixed points of the axis (each weight shared by its two neighbours), a line
becomes a table of its squared error at these points. Sharing out a weight between points h apart
adds about h²/6 to its squared error, whatever the line, so the product ranks lines well; the best
few are then settled on the weights themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from quantize.formats.bitvec import coefficients, groups_per_row, levels

_BEND = 4.0  # in rms: points lie evenly up to about here, ever further apart beyond
# Points of the axis at least: more would rank lines better and make the tables larger.
_POINTS = 256
# Lines that the table ranks first, whose exact errors decide: each costs a look at all weights.
_SHORTLIST = 2
DIRECT = 1024
"""Most shapes × scales lines that are all compared with every group. Beyond, a group looks at the
scales around its rms alone, which is faster and may miss the best line."""
NORMAL_REACH = 16.0
"""Largest weight of a group of 256 in units of the group's rms."""
_AT_ONCE = 1 << 18  # weights in work at once: their work space stays in the processor's cache
_SCORES = 1 << 23  # group and line pairs scored at once
_FEW_LEVELS = 32  # up to which comparing with all of them is faster than a search
# Of the mean importance: an input that never matters still decides where no other does.
_SMALLEST_SHARE = 1e-6


@dataclass(frozen=True)
class Codebook:
    """A matrix's lines as they will be stored, in float32. Line i is
    lines[i // Z] · scales[i % Z]."""

    lines: Tensor  # float32 [S, bits + bias], each equal to its float16 rounding
    scales: Tensor  # float32 [Z]
    bits: int

    @property
    def levels(self) -> Tensor:
        """Values of all codes, float32 [S·Z, 2^bits]."""
        return levels(coefficients(self.lines, self.scales), self.bits)

    @property
    def size(self) -> int:
        """S·Z, the lines that an index tells apart."""
        return len(self.lines) * len(self.scales)

    def times(self, factor: float) -> Codebook:
        """The codebook of a weight that is `factor` times as large."""
        return Codebook(self.lines, self.scales * factor, self.bits)


@dataclass(frozen=True)
class Groups:
    """A weight [N, K] cut into groups of g inputs, in units of about its rms: a power of
    two, so nothing is rounded."""

    w: Tensor
    share: Tensor  # float32 [G, g]; what an error there counts, 0 beyond the last input
    unit: float
    reach: float
    """Largest magnitude, in units."""

    @classmethod
    def of(cls, w: Tensor, group_size: int, importance: Tensor | None) -> Groups:
        """Cut up w [N, K] (any float dtype); ValueError for weights or an importance
        [K] that cannot be weighed."""
        K = w.shape[1]
        if not w.numel():
            raise ValueError("the weight is empty")
        largest = max(abs(float(end)) for end in torch.aminmax(w))
        if not math.isfinite(largest):
            raise ValueError("the weight holds values that are not finite")
        share = (
            torch.ones(K, device=w.device)
            if importance is None
            else _shares(importance.to(w.device), K)
        )
        G = groups_per_row(K, group_size)
        share = pad(share, (0, G * group_size - K)).view(G, group_size)
        unit = _power_of_two(_rms(w, largest))
        return cls(w, share, unit, largest / unit)

    @property
    def count(self) -> int:
        """N·G."""
        return self.w.shape[0] * self.share.shape[0]

    def pieces(self, columns: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Some whole rows at a time, as many as can be scored in `columns` ways: where,
        values and shares [M, g]."""
        G, g = self.share.shape
        step = max(1, min(_AT_ONCE // g, _SCORES // columns) // G)
        for first in range(0, len(self.w), step):
            rows = self.w[first : first + step].float() / self.unit
            x = pad(rows, (0, G * g - rows.shape[1])).view(-1, g)
            yield slice(first * G, first * G + len(x)), x, self.share.repeat(len(rows), 1)

    def pick(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Values and shares [M, g] of the groups with these numbers [M]."""
        G, g = self.share.shape
        row, group = chosen // G, chosen % G
        column = group[:, None] * g + torch.arange(g, device=chosen.device)
        x = self.w[row[:, None], column.clamp(max=self.w.shape[1] - 1)]
        return x.float() / self.unit, self.share[group]


def _shares(importance: Tensor, K: int) -> Tensor:
    if (
        importance.shape != (K,)
        or not bool((importance >= 0).all())
        or not bool(importance.isfinite().all())
    ):
        raise ValueError(f"importance must be {K} finite numbers that are not negative")
    importance = importance.double()
    mean = float(importance.mean()) if K else 0.0
    # Inputs that never matter still get the line that suits them best.
    return (
        (importance / mean).clamp_min(_SMALLEST_SHARE).float()
        if mean
        else torch.ones(K, device=importance.device)
    )


def _rms(w: Tensor, largest: float) -> float:
    if not largest:
        return 0.0
    step = max(1, _AT_ONCE // w.shape[1])
    pieces = (w[first : first + step].float() / largest for first in range(0, len(w), step))
    squares = sum(float(rows.square_().sum()) for rows in pieces)
    return largest * math.sqrt(squares / w.numel())


def _power_of_two(size: float) -> float:
    return 2.0 ** min(126, max(-126, round(math.log2(size)))) if size else 1.0


@dataclass(frozen=True)
class Axis:
    """Points of the real axis on which errors are tabulated, closest around
    0, the last ones at ±reach."""

    points: Tensor  # float32 [B], rising
    edge: float

    @classmethod
    def over(cls, reach: float, bits: int, device: torch.device) -> Axis:
        """Points for weights up to ±reach rounded to 2^bits levels."""
        edge = max(reach, 1.0) / (max(reach, 1.0) + _BEND)
        even = torch.linspace(-edge, edge, max(_POINTS, 2 << bits), dtype=torch.float64)
        return cls((_BEND * even / (1 - even.abs())).float().to(device), edge)

    def histogram(self, x: Tensor, share: Tensor) -> Tensor:
        """Shares of x [M, g] at the points, [M, B]: each weight's share is split
        between its two neighbours."""
        last = len(self.points) - 1
        place = (x / (x.abs() + _BEND) + self.edge).mul_(last / (2 * self.edge)).clamp_(0, last)
        below = place.floor().clamp_(max=last - 1)
        above = (place - below).mul_(share)
        at = below.long()
        out = torch.zeros(len(x), last + 1, device=x.device)
        return out.scatter_add_(1, torch.cat([at, at + 1], 1), torch.cat([share - above, above], 1))

    def nearest(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest code and squared error of every point under levels [L, 2^bits] →
        int64 and float32 [L, B]."""
        points = self.points.expand(len(levels), -1).contiguous()
        codes = Book.of(levels).nearest(points, torch.arange(len(levels), device=levels.device))
        return codes, (points - levels.gather(1, codes)).square_()


@dataclass(frozen=True)
class Book:
    """Levels of lines in rising order, which nearest codes are searched in."""

    rising: Tensor  # float32 [L, 2^bits]
    borders: Tensor  # float32 [L, 2^bits − 1]
    codes: Tensor  # int64 [L, 2^bits]; the codes of `rising`

    @classmethod
    def of(cls, levels: Tensor) -> Book:
        """Sort levels [L, 2^bits]."""
        rising, codes = levels.sort(dim=1)
        return cls(rising, (rising[:, 1:] + rising[:, :-1]) / 2, codes)

    def nearest(self, x: Tensor, line: Tensor) -> Tensor:
        """Codes (int64) nearest to x [M, g], row by row under lines [M]."""
        return self.codes[line].gather(1, self._places(x, line))

    def errors(self, x: Tensor, share: Tensor, line: Tensor) -> Tensor:
        """Σ share·(x − nearest level)² of every row of x [M, g] under lines [M] → [M]."""
        levels = self.rising[line]
        if levels.shape[1] > _FEW_LEVELS:
            distance = x - levels.gather(1, self._places(x, line))
        else:  # several times faster than a search
            distance = (x - levels[:, :1]).abs_()
            for q in range(1, levels.shape[1]):
                torch.minimum(distance, (x - levels[:, q : q + 1]).abs_(), out=distance)
        return distance.square_().mul_(share).sum(dim=1)

    def _places(self, x: Tensor, line: Tensor) -> Tensor:
        return torch.searchsorted(self.borders[line], x)


@dataclass(frozen=True)
class Matcher:
    """Finds the best line of groups; made once for a codebook and the reach
    of the values it will see."""

    codebook: Codebook
    axis: Axis
    book: Book
    tables: Tensor  # float32 [B, L], or [B, S] where groups are brought to a common scale first
    common_scale: bool

    @classmethod
    def of(cls, codebook: Codebook, reach: float) -> Matcher:
        """Tables of a codebook for values up to ±reach."""
        common_scale = len(codebook.scales) > 1 and codebook.size > DIRECT
        levels = codebook.levels
        shapes = (
            Codebook(codebook.lines, torch.ones_like(codebook.scales[:1]), codebook.bits).levels
            if common_scale
            else levels
        )
        axis = Axis.over(NORMAL_REACH if common_scale else reach, codebook.bits, levels.device)
        return cls(
            codebook, axis, Book.of(levels), axis.nearest(shapes)[1].T.contiguous(), common_scale
        )

    def best(self, x: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        """Best line (int64) and its error Σ share·(x − x̂)² of groups x [M, g] → [M], [M]."""
        lines = self._scaled_shortlist(x, share) if self.common_scale else self._shortlist(x, share)
        errors = torch.stack([self.book.errors(x, share, line) for line in lines.T], dim=1)
        least = errors.min(dim=1)
        return lines.gather(1, least.indices[:, None])[:, 0], least.values

    def _shortlist(self, x: Tensor, share: Tensor) -> Tensor:
        scores = self.axis.histogram(x, share) @ self.tables
        return scores.topk(
            min(_SHORTLIST, scores.shape[1]), dim=1, largest=False, sorted=True
        ).indices

    def _scaled_shortlist(self, x: Tensor, share: Tensor) -> Tensor:
        """The best shapes under the scale nearest to a group's rms and under its
        neighbours: shapes fit an rms of 1."""
        scales, order = self.codebook.scales.sort()
        Z = len(scales)
        place = torch.searchsorted((scales[1:] * scales[:-1]).sqrt(), group_rms(x, share)).clamp_(
            1, max(1, Z - 2)
        )
        # The codebook of a weight of zeros has scales of zero.
        size = scales[place].clamp_min(torch.finfo(torch.float32).tiny)
        shape = self._shortlist(x / size[:, None], share)
        near = torch.stack([place - 1, place, (place + 1).clamp(max=Z - 1)], dim=1)
        return (shape[:, :, None] * Z + order[near][:, None, :]).flatten(1)


def group_rms(x: Tensor, share: Tensor) -> Tensor:
    """Weighted rms of groups x [M, g] → [M]."""
    return (
        (x.square() * share).sum(dim=1)
        / share.sum(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    ).sqrt()


def assign(
    w: Tensor, codebook: Codebook, group_size: int, importance: Tensor | None = None
) -> Tensor:
    """Line of every group of w [N, K] with the least Σ importance_k·(w_k − ŵ_k)² → int32 [N, G].

    importance: [K] ≥ 0 or None. The error is exact among the few lines that a
    tabulated error ranks first.
    """
    groups = Groups.of(w, group_size, importance)
    matcher = Matcher.of(codebook.times(1 / groups.unit), groups.reach)
    index = torch.empty(groups.count, dtype=torch.int32, device=w.device)
    for where, x, share in groups.pieces(matcher.tables.shape[1]):
        index[where] = matcher.best(x, share)[0].int()
    return index.view(len(w), -1)


def round_codes(w: Tensor, codebook: Codebook, index: Tensor, group_size: int) -> Tensor:
    """Codes of w [N, K] with the nearest value under their group's line,
    index [N, G] → uint8 [N, K]."""
    N, K = w.shape
    book, width = Book.of(codebook.levels), index.shape[1] * group_size
    codes = torch.empty(N, K, dtype=torch.uint8, device=w.device)
    step = max(1, _AT_ONCE // max(width, 1))
    for first in range(0, N, step):
        rows = w[first : first + step].float()
        x = pad(rows, (0, width - K)).view(-1, group_size)
        nearest = book.nearest(x, index[first : first + step].flatten().long())
        codes[first : first + step] = nearest.view(len(rows), width)[:, :K].to(torch.uint8)
    return codes
