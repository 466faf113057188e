"""The code book an encoder rounds to: integers times a group scale, as stored or as the
FP8 tensor core sees them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.formats.fp8 import e4m3, product_weight, representable_scale, row_factor
from quantize.formats.packed_int import PackedInt
from quantize.formats.scheme import Packed
from quantize.solvers.shards import movable, settle
from quantize.threads import few_threads

# Clip ratios tried per group, evenly spaced: 5 % apart, and the fit's time grows with them.
_CLIPS = 12
# The smallest of them. Few bits want much clipping; a group that wants more comes to it by refits.
_MIN_CLIP = 0.45
# Times that the best of them becomes the least-squares scale of its own codes. With two, the error is
# 0.1 to 7 % below that of 24 ratios alone at 3 and 4 bits (12 to 28 % at 2), in half the time, whether
# weights are normal, Laplace or t distributed.
_REFITS = 2
# Weights whose scales are searched at once: what is tried on them stays in a core's cache.
_PIECE = 1 << 18
# Relative changes of a scale tried in the first, second and later sweeps: halved each time, since
# a scale that has been moved once is nearer its best; bfloat16 itself steps by 0.4 to 0.8 %.
_MOVES = (0.06, 0.03, 0.015)


@dataclass(frozen=True)
class Grid:
    """Signed integers of `bits` bits times a scale per group of `group_size` inputs.

    `product`: codes are fitted to E4M3(q·s8), what an INT4×FP8 kernel multiplies, instead of q·s.
    `fp8_scales`: group scales are kept to E4M3 multiples of a per-row factor, so
    vLLM re-derives the same codes.
    `shards`: with `fp8_scales`, into how many parts of its groups a row may be cut, rising powers of
    two, each part with a factor of its own under which the scales are found again.
    `signed`: scales may be negative, which gives the code -2^(bits-1) to the side that needs it.
    """

    bits: int
    group_size: int
    product: bool = False
    fp8_scales: bool = False
    signed: bool = False
    shards: tuple[int, ...] = ()

    @property
    def stored(self) -> torch.dtype:
        """In what scales are stored."""
        return torch.bfloat16

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        """Largest code."""
        return (1 << (self.bits - 1)) - 1

    def value(self, codes: Tensor, scale: Tensor, factor: Tensor) -> Tensor:
        """Weights of `codes`; scale and factor broadcast against it. Float32."""
        if self.product:
            return product_weight(codes, scale, factor)
        return codes * scale

    def book(self, scale: Tensor, factor: Tensor) -> Book:
        """The values of all codes under scales [R] of rows with factors [R]."""
        if not self.product:
            return Book(self, scale)
        codes = torch.arange(self.qmin, self.qmax + 1, device=scale.device, dtype=torch.float32)
        levels = product_weight(codes[:, None], scale.abs(), factor)
        step = levels[1 - self.qmin]
        step = torch.where(step == 0, 1.0, step)
        middles = (levels[1:] + levels[:-1]).div_(2 * step)
        ends = torch.full_like(middles[:1], torch.inf)
        sign = torch.ones_like(scale).copysign(scale)
        return ProductBook(
            self,
            step * sign,
            levels * sign,
            torch.cat((-ends, middles)),
            torch.cat((middles, ends)),
        )

    def books(self, scale: Tensor, factor: Tensor) -> list[Book]:
        """One book per group of scales [N, G] with factors [N, 1]."""
        return [self.book(scale[:, g], factor[:, 0]) for g in range(scale.shape[1])]

    def round(self, w: Tensor, scale: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest codes of w [N, K] under scales [N, G] and factors [N, 1] →
        (codes, values), float32 [N, K]."""
        codes, values = (
            torch.empty_like(w, memory_format=torch.contiguous_format) for _ in range(2)
        )
        rows = max(1, _PIECE // w.shape[1])
        for part, s, f, *into in _split(rows, w, scale, factor, codes, values):
            for out, found in zip(into, self._rounded(part, s, f), strict=True):
                out.view(len(part), -1, self.group_size).copy_(found.permute(1, 2, 0))
        return codes, values

    def _rounded(self, w: Tensor, scale: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        """As `round`, each [group_size, N, G], of few rows: every group is a row of one book."""
        N, G = scale.shape[:2]
        book = self.book(scale.flatten(0, 1), factor.expand(N, G).flatten())
        codes, values = book.round(_columns(w, self.group_size).flatten(1))
        return codes.view(-1, N, G), values.view(-1, N, G)

    def expand(self, scale: Tensor) -> Tensor:
        """Group scales [N, G] → one per input [N, K]."""
        return scale.repeat_interleave(self.group_size, dim=1)

    def held(self, codes: Tensor, scale: Tensor) -> Packed:
        """Codes and scales in the layout that this grid is for."""
        return self.pack(codes, scale)

    def pack(self, codes: Tensor, scale: Tensor) -> PackedInt:
        """Codes [N, K] and scales [N, G] (already representable) as the stored layout."""
        return PackedInt(codes.to(torch.int8), scale.to(torch.bfloat16), self.bits, self.group_size)

    def _representable(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Round scales to what the checkpoint can hold; return them with
        the per-row factor [N, 1]."""
        scale = scale.to(self.stored).float()
        factor = row_factor(scale.abs())
        if self.fp8_scales:
            scale = representable_scale(scale, factor).float()
        return scale, factor

    def absmax_scale(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Scales max|w| / qmax of every group of w [N, K] → (scale [N, G], factor [N, 1])."""
        absmax = _nonzero(group_absmax(w, self.group_size) / self.qmax)
        if not self._in_shards:
            return self._representable(absmax)
        wanted = absmax.to(torch.bfloat16).float()
        # What was asked for are these scales and not a small error, so the nearest to them.
        settled = settle(wanted, lambda scale: (scale - wanted).square_(), self.shards)
        return settled.scale, settled.factor

    def fit_scale(self, w: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scales of w [N, K] that minimise Σ importance_k·(w_k − ŵ_k)² over clip
        ratios (importance [K] or None), then over scales with the codes kept.

        Returns (scale [N, G], factor [N, 1]).
        """
        with few_threads(w):
            return self._fit_scale(w, importance_row(w, importance))

    def _fit_scale(self, w: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        absmax = _nonzero(group_absmax(w, self.group_size) / self.qmax).to(torch.bfloat16).float()
        rows = max(1, _PIECE // w.shape[1])
        parts = _split(rows, w, absmax)
        best = torch.cat([self._best_scale(part, weight, start) for part, start in parts])
        if not self.fp8_scales:
            return self._representable(best)
        made = [self._fp8_scale(part, near, weight) for part, near in _split(rows, w, best)]
        scales, factors = zip(*made, strict=True)
        return torch.cat(scales), torch.cat(factors)

    def _fp8_scale(self, w: Tensor, best: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scales near `best` that an FP8 engine derives again, and the rows' factors."""
        if self._in_shards:
            grouped, share = (t.reshape(len(t), -1, self.group_size) for t in (w, weight))
            settled = settle(best, lambda scale: self._error(grouped, share, scale), self.shards)
            scale, factor = settled.scale, settled.factor
        else:
            scale, factor = self._representable(best)
        return self._fit_fp8(w, scale, factor, weight), factor

    def _best_scale(self, w: Tensor, weight: Tensor, absmax: Tensor) -> Tensor:
        """The scales [N, G] that `fit_scale` looks for, before they are made representable; absmax:
        those that reach the largest weight."""
        grouped, share = (t.reshape(len(t), -1, self.group_size) for t in (w, weight))
        ratios = torch.linspace(_MIN_CLIP, 1.0, _CLIPS).tolist()
        best, least = absmax, torch.full_like(absmax, torch.inf)
        for ratio in ratios:
            scale = (absmax * ratio).to(self.stored).float()
            steps = grouped / scale[..., None]
            nearest = steps.round()
            for sign in (1, -1) if self.signed else (1,):
                error = self._missed(steps, nearest, share, sign) * scale.square()
                best, least = better_scale(error, scale * sign, least, best)
        for _ in range(_REFITS):
            codes = self._codes(grouped, best)
            seen = codes * share
            size = (seen * codes).sum(dim=2)
            scale = ((seen * grouped).sum(dim=2) / size).to(self.stored).float()
            # A group of zeros has codes of zero, which every scale suits; and none may become zero.
            scale = torch.where((size > 0) & (scale != 0), scale, best)
            best, least = better_scale(self._error(grouped, share, scale), scale, least, best)
        return best

    @property
    def _in_shards(self) -> bool:
        return self.fp8_scales and bool(self.shards)

    def _codes(self, grouped: Tensor, scale: Tensor) -> Tensor:
        """Nearest codes of w [N, G, group_size] under scales [N, G] of q·s, whatever the kernel's."""
        return (grouped / scale[..., None]).round_().clamp_(self.qmin, self.qmax)

    def _error(self, grouped: Tensor, share: Tensor, scale: Tensor) -> Tensor:
        """Σ share·(w − q·s)² of every group under scales [N, G] → [N, G]."""
        steps = grouped / scale[..., None]
        return self._missed(steps, steps.round(), share) * scale.square()

    def _missed(self, steps: Tensor, nearest: Tensor, share: Tensor, sign: int = 1) -> Tensor:
        """Σ share·distance² of w / s [N, G, group_size] from the codes that it may have → [N, G]; nearest: the
        whole number next to it; sign: that of the scale, beside |s|."""
        low, high = (self.qmin, self.qmax) if sign > 0 else (-self.qmax, -self.qmin)
        return nearest.clamp(low, high).sub_(steps).square_().mul_(share).sum(dim=2)

    def _fit_fp8(self, w: Tensor, scale: Tensor, factor: Tensor, weight: Tensor) -> Tensor:
        """Try the neighbouring E4M3 scale codes on the grid that the kernel sees; a
        row's largest scale stays."""
        best, best_error = scale, self.group_error(w, scale, factor, weight)
        for steps in (-1, 1, -2, 2):
            candidate = self._neighbour(scale, factor, steps)
            error = self.group_error(w, candidate, factor, weight)
            best = torch.where(error < best_error, candidate, best)
            best_error = torch.minimum(error, best_error)
        return best

    def refit(self, codes: Tensor, value: Tensor, slope: Tensor, metric: Tensor) -> Tensor | None:
        """The scales [N, …] of one group with which its codes [N, group_size] lose least, as far as
        the checkpoint can hold them; None: grids of this kind go by `scale_moves` alone.

        value, slope: the group's weights and half the loss's gradient now, [N, group_size]. metric:
        its part of the Hessian.
        """
        return None

    def _neighbour(self, scale: Tensor, factor: Tensor, steps: int) -> Tensor:
        """Scales [N, G] some E4M3 codes further; the largest one of a row, and of a shard, stays:
        factors ([N, 1] of rows) are derived from them."""
        free, ceiling = movable(scale, factor, self.shards)
        code = e4m3(scale.abs() / factor)
        size = 2.0 ** (torch.floor(torch.log2(code)) - 3)
        moved = torch.minimum(e4m3((code + steps * size).clamp_min(2.0**-9)), ceiling)
        moved = (moved * factor).copysign(scale)
        return torch.where(free, representable_scale(moved, factor).float(), scale)

    def scale_moves(self, scale: Tensor, factor: Tensor, sweep: int) -> tuple[Tensor, Tensor]:
        """Smaller and larger alternatives to group scales [N, G] that the checkpoint
        can hold; finer every sweep."""
        if self.fp8_scales:
            return self._neighbour(scale, factor, -1), self._neighbour(scale, factor, 1)
        step = _MOVES[min(sweep, len(_MOVES) - 1)]
        smaller = scale * (1 - step)
        larger = scale * (1 + step)
        return smaller.to(self.stored).float(), larger.to(self.stored).float()

    def group_error(self, w: Tensor, scale: Tensor, factor: Tensor, weight: Tensor) -> Tensor:
        """Σ weight·(w − ŵ)² of every group → [N, G]; w, weight: [N, K] and [1, K], of few rows."""
        off = self._rounded(w, scale, factor)[1].sub_(_columns(w, self.group_size))
        return off.square_().mul_(_columns(weight, self.group_size)).sum(dim=0)


@dataclass(frozen=True)
class Book:
    """Values of all codes for R rows that each have one scale [R]."""

    grid: Grid
    step: Tensor
    """Value of the code 1, [R]."""

    def round(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest codes of w [M, R] → (codes, values), float32 of the same shape."""
        codes = (w / self.step).round_().clamp_(self.grid.qmin, self.grid.qmax)
        return codes, codes * self.step

    def value(self, codes: Tensor) -> Tensor:
        """Values of codes [M, R], float32."""
        return codes * self.step


@dataclass(frozen=True)
class ProductBook(Book):
    """Products E4M3(q·s8), which are not evenly spaced. `step` is 1, with the scale's sign, where all codes have
    the value 0."""

    levels: Tensor
    """Values of all codes from the least one on, [2^bits, R]."""
    below: Tensor
    """[2^bits, R], in steps: halfway from each code's level to the one before; −∞ of the first."""
    above: Tensor
    """[2^bits, R], in steps: halfway from each code's level to the next; ∞ of the last."""

    def round(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest codes of w [M, R] → (codes, values), float32 of the same shape."""
        steps = w / self.step
        # A level is off q·s by a sixteenth of itself at most, which is less than half a step up to the
        # code 8, so the nearest is this one or its neighbour.
        index = steps.round().clamp_(self.grid.qmin, self.grid.qmax).sub_(self.grid.qmin).long()
        higher = steps > self.above.gather(0, index)
        lower = steps <= self.below.gather(0, index)
        index.add_(higher).sub_(lower.long())
        return index.float().add_(self.grid.qmin), self.levels.gather(0, index)

    def value(self, codes: Tensor) -> Tensor:
        """Values of codes [M, R], float32."""
        return self.levels.gather(0, codes.long().sub_(self.grid.qmin))


def importance_row(w: Tensor, importance: Tensor | None) -> Tensor:
    """Importance of the inputs of w [N, K], or one for all, as [1, K]; dense, since it is read for every row, and the
    diagonal of a matrix as it lies there takes ten times as long."""
    return torch.ones_like(w[:1]) if importance is None else importance.to(w).contiguous()[None]


def _columns(w: Tensor, group_size: int) -> Tensor:
    """w [N, K] → [group_size, N, G], in which a group's weights stand one below the other."""
    return w.reshape(len(w), -1, group_size).permute(2, 0, 1)


def better_scale(
    error: Tensor, scale: Tensor, least: Tensor, best: Tensor
) -> tuple[Tensor, Tensor]:
    """The better of two scales [N, G] of every group, `scale` and `best`, and its error [N, G]."""
    better = error < least
    return torch.where(better, scale, best), torch.where(better, error, least)


def _split(rows: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """So many rows of all of them at a time."""
    return zip(*(torch.split(t, rows) for t in tensors), strict=True)


def group_absmax(w: Tensor, group_size: int) -> Tensor:
    """Largest magnitude of every group of w [N, K] → [N, K / group_size]."""
    return w.abs().reshape(len(w), -1, group_size).amax(dim=2)


def _nonzero(scale: Tensor) -> Tensor:
    """Give a group of zeros its row's largest scale (1 in a row of zeros), so that
    it changes no row factor."""
    largest = scale.amax(dim=1, keepdim=True)
    fallback = torch.where(largest > 0, largest, torch.ones_like(largest))
    return torch.where(scale > 0, scale, fallback)
