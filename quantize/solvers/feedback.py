"""Rounding in the Hessian's metric: GPTQ error feedback, then monotone coordinate descent.

All functions minimise tr((Ŵ − W) H (Ŵ − W)ᵀ) over codes and scales of one linear,
W [N, K], H = E[x xᵀ] [K, K].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from quantize.cost.footprint import SOLVER_ROWS, WELL_CONDITIONED
from quantize.solvers.grid import Book, Grid
from quantize.solvers.products import (
    invert_lower_,
    quadratic,
    times_upper_,
    times_upper_transposed_,
    turn_,
)
from quantize.threads import few_threads

# Columns between two wide matrix updates, as GPTQ has it: wider blocks spend more time in the loop
# over columns, narrower ones make the updates too thin to run fast.
_BLOCK = 128
# Each takes ten times the damping of the one before. Past 10⁵ times the recipe's, a fit would see
# little of the inputs any more, and data-free rounding says so openly.
_MAX_DAMPING_TRIES = 6
# Of a linear, that descent works on at once on a CPU: with a block's columns, two megabytes a tensor.
_ROWS = 4096
Moves = Sequence[Tensor]
"""Scales [N, G] that groups may take instead of theirs."""
# Descent ends with a sweep that gains less: the next would cost as much and gain less still.
_MIN_GAIN = 0.005


@dataclass
class Rounded:
    """Codes [N, K] (float32 whole numbers), scales [N, G] and per-row
    factor [N, 1] of one linear."""

    codes: Tensor
    scale: Tensor
    factor: Tensor

    def value(self, grid: Grid) -> Tensor:
        """Quantized weight [N, K] in float32, on the grid that was fitted."""
        return grid.value(self.codes, grid.expand(self.scale), self.factor)


@dataclass(frozen=True)
class Damped:
    """A Hessian made safe to factor, and what it took."""

    order: Tensor
    """Columns in the order in which error feedback visits them, [K]."""
    inverse_factor: Tensor
    """Upper U with H⁻¹ = Uᵀ U, of the damped Hessian permuted by `order`."""
    damping: float
    """Part of the mean that `delta` is."""
    delta: float
    """Added to every diagonal element: `damping` times the mean of those of live inputs.

    As float32 has it, in which metrics are damped; the factor was damped by
    the same in its own precision.
    """
    dead: Tensor
    """bool [K], natural order: inputs that were always zero."""

    def solve_(self, rows: Tensor) -> Tensor:
        """rows [N, K] times H⁻¹ of the damped Hessian, in place."""
        U, ordered = self.inverse_factor, rows[:, self.order]
        rows[:, self.order] = times_upper_(times_upper_transposed_(ordered, U), U)
        return rows

    @contextmanager
    def metric(self, hessian: Tensor) -> Iterator[Tensor]:
        """The Hessian [K, K] that this was made of, damped: in it a fit errs least.

        It is the caller's own, changed in place until the context ends:
        another takes too much room.
        """
        diagonal = hessian.diagonal()
        plain = diagonal.clone()
        diagonal.add_(self.delta)
        try:
            yield hessian
        finally:
            diagonal.copy_(plain)


def feedback_order(hessian: Tensor, order: Literal["natural", "activation"]) -> Tensor:
    """Column order [K]: as stored, or by falling mean square of the input (GPTQ's act-order)."""
    if order == "natural" or not _finite(hessian):
        return torch.arange(hessian.shape[0], device=hessian.device)
    return torch.argsort(hessian.diagonal(), descending=True, stable=True)


def _finite(matrix: Tensor) -> bool:
    """Whether all is finite; by the ends of its range, which take no room and keep a NaN."""
    return bool(torch.isfinite(torch.stack(torch.aminmax(matrix))).all())


def damp(hessian: Tensor, damping: float, order: Tensor) -> Damped | None:
    """Damp H by `damping`·mean(diag) and factor its inverse, in double precision where little is
    added; raises the damping tenfold until that works.

    The mean is that of live inputs: those that are always zero tell
    nothing about the size of others.
    Returns None when H is not finite, is zero or stays singular: the caller
    falls back to data-free rounding.
    """
    if not _finite(hessian) or not bool((hessian.diagonal() > 0).any()):
        return None
    diagonal = hessian.diagonal()[order].double()
    dead = diagonal <= 0
    mean = float(diagonal[~dead].mean())
    # One matrix, worked on in place: K = 14336 takes 1.6 GB in doubles.
    single = damping >= WELL_CONDITIONED
    work = torch.empty_like(hessian, dtype=torch.float32 if single else torch.float64)
    last_first = order.flip(0)
    for attempt in range(_MAX_DAMPING_TRIES):
        amount = damping * 10.0**attempt
        for rows, picked in zip(
            torch.split(work, SOLVER_ROWS), torch.split(last_first, SOLVER_ROWS), strict=True
        ):
            rows.copy_(hessian[picked][:, last_first])
        work.diagonal().copy_(torch.where(dead, mean, diagonal + amount * mean).flip(0))
        if _inverse_factor(work):
            natural = torch.empty_like(dead)
            natural[order] = dead
            delta = float(amount * hessian.diagonal()[~natural].mean())
            return Damped(order, work.mT.float(), amount, delta, natural)
    return None


def _inverse_factor(work: Tensor) -> bool:
    """Symmetric P H P [K, K] → U with H⁻¹ = Uᵀ U, transposed and in place; false where H is not positive
    definite. P turns the order round.

    P H P = L Lᵀ makes H = R Rᵀ of the upper triangular R = P L P, and U is its inverse: half the work of
    inverting H and factoring that, and no rounding of H⁻¹ in between.
    """
    columns = work.mT  # which is what LAPACK reads and writes without a copy
    info = torch.empty((), dtype=torch.int32, device=work.device)
    torch.linalg.cholesky_ex(columns, out=(columns, info))
    if int(info) != 0:
        return False
    turn_(invert_lower_(columns))
    return _finite(work)


class CodeBook(Protocol):
    """The values that R rows may take within one group."""

    def round(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest codes of w [M, R] → (codes, values), float32 of the same shape."""


class Books(Protocol):
    """A code book for every group."""

    def __getitem__(self, group: int, /) -> CodeBook:
        """The one of `group`."""


def error_feedback(
    w: Tensor, d: Damped, grid: Grid, scale: Tensor, factor: Tensor
) -> tuple[Rounded, Tensor]:
    """GPTQ on a grid with scales [N, G] fixed beforehand, and the rows' squared errors
    (`feed_back`)."""
    codes, lost = feed_back(w, d, grid.books(scale, factor), grid.group_size)
    return Rounded(codes, scale, factor), lost


def feed_back(w: Tensor, d: Damped, books: Books, group_size: int) -> tuple[Tensor, Tensor]:
    """GPTQ (arXiv 2210.17323, algorithm 1) of w [N, K], each group's book fixed beforehand: codes [N, K],
    and every row's squared error in the damped metric, [N].

    Books stay with their natural groups whatever the column order, so
    the checkpoint needs no g_idx.
    """
    order, U = d.order, d.inverse_factor
    w = w.masked_fill(d.dead, 0)[:, order]
    group = (order // group_size).tolist()
    codes, lost = torch.empty_like(w), torch.zeros_like(w[:, 0])
    K = w.shape[1]
    for start in range(0, K, _BLOCK):
        stop = min(start + _BLOCK, K)
        columns = w[:, start:stop].T.contiguous()  # a column is contiguous only when it is a row
        rounded, errors = torch.empty_like(columns), torch.empty_like(columns)
        with few_threads(columns):
            for i, j in enumerate(range(start, stop)):
                q, value = books[group[j]].round(columns[i : i + 1])
                rounded[i] = q[0]
                errors[i] = (columns[i] - value[0]) / U[j, j]
                columns[i + 1 :].addr_(U[j, j + 1 : stop], errors[i], alpha=-1)
        codes[:, start:stop] = rounded.T
        w[:, stop:].addmm_(errors.T, U[start:stop, stop:], alpha=-1)
        # W − Ŵ = E U, and U (H + δI) Uᵀ is one.
        lost += errors.square_().sum(dim=0)
    out = torch.empty_like(codes)
    out[:, order] = codes
    return out, lost


def undamped(lost: Tensor, delta: Tensor, d: Damped) -> Tensor:
    """What `feed_back` lost by rows [N], without what damping had in it; delta: Ŵ − W [N, K]."""
    added = delta.masked_fill(d.dead, 0).square_().sum(dim=1)
    return (lost - added * d.delta).clamp_min_(0)


def loss(w: Tensor, rounded: Rounded, hessian: Tensor, grid: Grid) -> Tensor:
    """Per-row tr((Ŵ − W) H (Ŵ − W)ᵀ) → [N]."""
    return quadratic(rounded.value(grid) - w, hessian)


def descend(
    w: Tensor,
    rounded: Rounded,
    hessian: Tensor,
    grid: Grid,
    sweeps: int,
    lost: Tensor | None = None,
) -> Rounded:
    """Coordinate descent from `rounded`, whose rows lose `lost` [N] where that is known: every sweep goes
    through the groups once, moves the scales of each and then its codes.

    Each move is the exact minimiser of its coordinate, so the loss never grows; ends early once a
    sweep gains less than half a percent. Rows know nothing of each other. On a CPU a few thousand go at
    a time: more would take what each step of a move makes from the system anew.
    """
    if lost is None:
        lost = loss(w, rounded, hessian, grid)
    rows = max(1, len(w) if w.is_cuda else _ROWS)
    parts = zip(
        *(torch.split(t, rows) for t in (w, rounded.codes, rounded.scale, rounded.factor, lost)),
        strict=True,
    )
    done = [
        _descend(part, Rounded(*start), hessian, grid, sweeps, float(before.sum()))
        for part, *start, before in parts
    ]
    codes, scale = torch.cat([r.codes for r in done]), torch.cat([r.scale for r in done])
    return Rounded(codes, scale, rounded.factor)


def _descend(
    w: Tensor, rounded: Rounded, hessian: Tensor, grid: Grid, sweeps: int, lost: float
) -> Rounded:
    state = _Descent.start(w, rounded, grid)
    for sweep in range(sweeps):
        gain = state.sweep(hessian, grid, grid.scale_moves(state.scale, state.factor, sweep))
        if sweep + 1 == sweeps or (gained := float(gain)) < lost * _MIN_GAIN:
            break
        lost -= gained
    return Rounded(state.codes.T.contiguous(), state.scale, state.factor)


@dataclass
class _Descent:
    """Codes, values and errors Ŵ − W, kept consistent by every move; each transposed [K, N], so that the
    columns that a move goes through are contiguous."""

    codes: Tensor
    scale: Tensor
    """[N, G]"""
    factor: Tensor
    """[N, 1]"""
    value: Tensor
    error: Tensor

    @classmethod
    def start(cls, w: Tensor, r: Rounded, grid: Grid) -> _Descent:
        value = r.value(grid).T.contiguous()
        codes = r.codes.T.clone(memory_format=torch.contiguous_format)  # never the caller's own
        return cls(codes, r.scale.clone(), r.factor, value, value - w.T)

    def sweep(self, H: Tensor, grid: Grid, moves: Moves) -> Tensor:
        """Move scales, which may become those of `moves` [N, G], and codes, a few whole groups at a
        time → what the loss fell by, a scalar.

        Half the loss's gradient, (Ŵ − W) H, is computed for those columns alone, when they are come to:
        one product [K, K] × [K, N] a sweep, as bringing it up to date after every move would take, but
        none to begin with, and nothing that rounding errors add up in.
        """
        G, K = grid.group_size, len(self.value)
        width = G * max(1, _BLOCK // G)
        gain = torch.zeros_like(H[0, 0])
        for start in range(0, K, width):
            span = slice(start, min(start + width, K))
            slope = H[span] @ self.error
            part = _Part(self.codes[span], self.value[span], slope.clone(), H[span, span])
            before = part.value.clone()
            with few_threads(before):
                books = [
                    self._move_scale((start + i) // G, slice(i, i + G), part, grid, moves)
                    for i in range(0, len(before), G)
                ]
                _move_columns(part, books, G)
            moved = part.value - before
            self.error[span] += moved
            gain -= torch.addmm(slope.mul_(2), part.H, moved).mul_(moved).sum()
        return gain

    def _move_scale(self, g: int, rows: slice, part: _Part, grid: Grid, moves: Moves) -> Book:
        """Try other scales for group g, whose columns are `rows` of the part, with the codes kept
        and with the codes rounded again."""
        block, codes, here = part.H[rows, rows], part.codes[rows], part.value[rows]
        twice = 2 * part.slope[rows]
        least, again = torch.zeros_like(here[0]), torch.zeros_like(here[0], dtype=torch.bool)
        best = self.scale[:, g]
        fitted = grid.refit(codes.T, here.T, part.slope[rows].T, block)
        for scale in [move[:, g] for move in moves] + ([] if fitted is None else [fitted]):
            book = grid.book(scale, self.factor[:, 0])
            for rounds, trial in ((False, book.value(codes)), (True, book.round(here)[1])):
                delta = trial.sub_(here)
                gain = torch.addmm(twice, block, delta).mul_(delta).sum(dim=0)
                better = gain < least
                least = torch.where(better, gain, least)
                again = torch.where(better, rounds, again)
                best = torch.where(better if scale.dim() == 1 else better[:, None], scale, best)
        # What won is made anew, which takes less than to carry the best along.
        book = grid.book(best, self.factor[:, 0])
        chosen = torch.where(again, book.round(here)[0], codes)
        value = torch.where(least < 0, book.value(chosen), here)
        part.slope.addmm_(part.H[:, rows], value - here)
        part.codes[rows], part.value[rows], self.scale[:, g] = chosen, value, best
        return book


@dataclass(frozen=True)
class _Part:
    """Some columns of a descent as rows: codes, values and gradient [C, N], changed in place; the gradient
    only as far as columns are still to come."""

    codes: Tensor
    value: Tensor
    slope: Tensor
    H: Tensor
    """Hessian of these columns [C, C]."""


def _move_columns(part: _Part, books: Books, group_size: int, first: int = 0) -> None:
    """One sweep over the columns of a part, whose first has that number among those of the books'
    groups."""
    for start in range(0, len(part.value), _BLOCK):
        stop = min(start + _BLOCK, len(part.value))
        old, slope = part.value[start:stop], part.slope[start:stop]
        new = torch.empty_like(old)
        H = part.H[start:stop, start:stop]
        for i in range(stop - start):
            target = torch.addcdiv(old[i : i + 1], slope[i : i + 1], H[i, i], value=-1)
            book = books[(first + start + i) // group_size]
            part.codes[start + i : start + i + 1], new[i : i + 1] = book.round(target)
            slope[i + 1 :].addr_(H[i, i + 1 :], new[i] - old[i])
        part.slope[stop:].addmm_(part.H[stop:, start:stop], new - old)
        part.value[start:stop] = new


def move_codes(
    codes: Tensor, value: Tensor, gradient: Tensor, H: Tensor, books: Books, group_size: int
) -> None:
    """One sweep of coordinate descent over the columns of codes, values and gradient
    (Ŵ − W) H, [N, K], in place.

    The gradient is updated in blocks (QuantEase, arXiv 2309.01885).
    """
    K = value.shape[1]
    for start in range(0, K, _BLOCK):
        span = slice(start, min(start + _BLOCK, K))
        # Columns as contiguous rows.
        chosen, new, slope = (t[:, span].T.contiguous() for t in (codes, value, gradient))
        old = new.clone()
        with few_threads(old):
            _move_columns(_Part(chosen, new, slope, H[span, span]), books, group_size, start)
        codes[:, span], value[:, span] = chosen.T, new.T
        gradient.addmm_((new - old).T, H[span])
