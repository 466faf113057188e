"""Rounding in the Hessian's metric: GPTQ error feedback, then monotone coordinate descent.

All functions minimise tr((Ŵ − W) H (Ŵ − W)ᵀ) over codes and scales of one linear,
W [N, K], H = E[x xᵀ] [K, K].
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from quantize.cost.footprint import SOLVER_ROWS
from quantize.solvers.grid import Grid

# Columns between two wide matrix updates, as GPTQ has it: wider blocks spend more time in the loop
# over columns, narrower ones make the updates too thin to run fast.
_BLOCK = 128
# Each takes ten times the damping of the one before. Past 10⁵ times the recipe's, a fit would see
# little of the inputs any more, and data-free rounding says so openly.
_MAX_DAMPING_TRIES = 6
# Elements of a block of columns, below which a second thread costs more than it brings.
_SMALL = 1 << 20
# Descent ends with a sweep that gains less: the next would cost as much and gain less still.
_MIN_GAIN = 0.005


@contextmanager
def _few_threads(work: Tensor) -> Iterator[None]:
    """Run a loop of tiny operations on one CPU thread.

    Waiting for a second thread costs more than it brings, and on a machine that
    others use tens of times more.
    """
    threads = torch.get_num_threads()
    if work.is_cuda or work.numel() > _SMALL or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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
    the same in double precision.
    """
    dead: Tensor
    """bool [K], natural order: inputs that were always zero."""

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
    """Whether all is finite; in pieces, since `isfinite` takes more room than what it looks at."""
    return all(bool(torch.isfinite(rows).all()) for rows in torch.split(matrix, SOLVER_ROWS))


def damp(hessian: Tensor, damping: float, order: Tensor) -> Damped | None:
    """Damp H by `damping`·mean(diag) and factor its inverse; raises the
    damping tenfold until that works.

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
    # One matrix of doubles, worked on in place: K = 14336 takes 1.6 GB.
    work = torch.empty_like(hessian, dtype=torch.float64)
    for attempt in range(_MAX_DAMPING_TRIES):
        amount = damping * 10.0**attempt
        for rows, picked in zip(
            torch.split(work, SOLVER_ROWS), torch.split(order, SOLVER_ROWS), strict=True
        ):
            rows.copy_(hessian[picked][:, order])
        work.diagonal().copy_(torch.where(dead, mean, diagonal + amount * mean))
        if _inverse_factor(work):
            natural = torch.empty_like(dead)
            natural[order] = dead
            delta = float(amount * hessian.diagonal()[~natural].mean())
            return Damped(order, work.mT.float(), amount, delta, natural)
    return None


def _inverse_factor(work: Tensor) -> bool:
    """Symmetric H [K, K] → U with H⁻¹ = Uᵀ U, transposed and in place; false where H
    is not positive definite."""
    columns = work.mT  # which is what LAPACK reads and writes without a copy
    info = torch.empty((), dtype=torch.int32, device=work.device)
    torch.linalg.cholesky_ex(columns, out=(columns, info))
    if int(info) != 0:
        return False
    torch.cholesky_inverse(columns, out=columns)
    torch.linalg.cholesky_ex(columns, upper=True, out=(columns, info))
    return int(info) == 0 and _finite(work)


class CodeBook(Protocol):
    """The values that R rows may take within one group."""

    def round(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest codes of w [M, R] → (codes, values), float32 of the same shape."""


class Books(Protocol):
    """A code book for every group."""

    def __getitem__(self, group: int, /) -> CodeBook:
        """The one of `group`."""


def error_feedback(w: Tensor, d: Damped, grid: Grid, scale: Tensor, factor: Tensor) -> Rounded:
    """GPTQ on a grid with scales [N, G] fixed beforehand (`feed_back`)."""
    return Rounded(feed_back(w, d, grid.books(scale, factor), grid.group_size), scale, factor)


def feed_back(w: Tensor, d: Damped, books: Books, group_size: int) -> Tensor:
    """GPTQ (arXiv 2210.17323, algorithm 1): codes [N, K] of w [N, K], each
    group's book fixed beforehand.

    Books stay with their natural groups whatever the column order, so
    the checkpoint needs no g_idx.
    """
    order, U = d.order, d.inverse_factor
    w = w.masked_fill(d.dead, 0)[:, order]
    group = (order // group_size).tolist()
    codes = torch.empty_like(w)
    K = w.shape[1]
    for start in range(0, K, _BLOCK):
        stop = min(start + _BLOCK, K)
        columns = w[:, start:stop].T.contiguous()  # a column is contiguous only when it is a row
        rounded, errors = torch.empty_like(columns), torch.empty_like(columns)
        with _few_threads(columns):
            for i, j in enumerate(range(start, stop)):
                q, value = books[group[j]].round(columns[i : i + 1])
                rounded[i] = q[0]
                errors[i] = (columns[i] - value[0]) / U[j, j]
                columns[i + 1 :].addr_(U[j, j + 1 : stop], errors[i], alpha=-1)
        codes[:, start:stop] = rounded.T
        w[:, stop:].addmm_(errors.T, U[start:stop, stop:], alpha=-1)
    out = torch.empty_like(codes)
    out[:, order] = codes
    return out


def loss(w: Tensor, rounded: Rounded, hessian: Tensor, grid: Grid) -> Tensor:
    """Per-row tr((Ŵ − W) H (Ŵ − W)ᵀ) → [N]."""
    delta = rounded.value(grid) - w
    rows: Tensor = ((delta @ hessian) * delta).sum(dim=1)
    return rows


def descend(w: Tensor, rounded: Rounded, hessian: Tensor, grid: Grid, sweeps: int) -> Rounded:
    """Coordinate descent from `rounded`: every sweep moves group scales, then codes.

    Each move is the exact minimiser of its coordinate, so the loss never grows; ends early once a
    sweep gains less than half a percent.
    """
    state = _Descent.start(w, rounded, hessian, grid)
    before = state.loss(w)
    for sweep in range(sweeps):
        _move_scales(state, hessian, grid, sweep)
        books = grid.books(state.scale, state.factor)
        move_codes(state.codes, state.value, state.gradient, hessian, books, grid.group_size)
        after = state.loss(w)
        if after > before * (1 - _MIN_GAIN):
            break
        before = after
    return Rounded(state.codes, state.scale, state.factor)


@dataclass
class _Descent:
    """Codes, scales, values [N, K] and half the loss's gradient (Ŵ − W) H, kept
    consistent by every move."""

    codes: Tensor
    scale: Tensor
    factor: Tensor
    value: Tensor
    gradient: Tensor

    @classmethod
    def start(cls, w: Tensor, r: Rounded, hessian: Tensor, grid: Grid) -> _Descent:
        value = r.value(grid)
        return cls(r.codes.clone(), r.scale.clone(), r.factor, value, (value - w) @ hessian)

    def loss(self, w: Tensor) -> float:
        return float(((self.value - w) * self.gradient).sum())


def move_codes(
    codes: Tensor, value: Tensor, gradient: Tensor, H: Tensor, books: Books, group_size: int
) -> None:
    """One sweep of coordinate descent over the columns of codes, values and gradient
    (Ŵ − W) H, [N, K], in place.

    The gradient is updated in blocks (QuantEase, arXiv 2309.01885).
    """
    K = value.shape[1]
    for start in range(0, K, _BLOCK):
        stop = min(start + _BLOCK, K)
        span = slice(start, stop)
        # Columns as contiguous rows.
        slope = gradient[:, span].T.contiguous()
        old = value[:, span].T.contiguous()
        chosen, new = torch.empty_like(old), torch.empty_like(old)
        with _few_threads(old):
            for i, j in enumerate(range(start, stop)):
                target = torch.addcdiv(old[i : i + 1], slope[i : i + 1], H[j, j], value=-1)
                chosen[i : i + 1], new[i : i + 1] = books[j // group_size].round(target)
                slope[i + 1 :].addr_(H[j, j + 1 : stop], new[i] - old[i])
        codes[:, span] = chosen.T
        value[:, span] = new.T
        gradient.addmm_((new - old).T, H[span])


def _move_scales(state: _Descent, H: Tensor, grid: Grid, sweep: int) -> None:
    """Try neighbouring scales group by group, with the codes kept and
    with the codes rounded again."""
    G = grid.group_size
    candidates = grid.scale_moves(state.scale, state.factor, sweep)
    for g in range(state.scale.shape[1]):
        span = slice(g * G, (g + 1) * G)
        block = H[span, span]
        old = state.codes[:, span]
        here = state.value[:, span]
        slope = state.gradient[:, span]
        best = torch.zeros_like(here[:, 0])
        best_value = here.clone()
        best_codes = old.clone()
        best_scale = state.scale[:, g].clone()
        tried = [candidate[:, g] for candidate in candidates]
        fitted = grid.refit(old, here, slope, block)
        for s in [*tried, *([] if fitted is None else [fitted])]:
            codes, values = grid.book(s, state.factor[:, 0]).round(here.T)
            trials = ((old, grid.value(old, s[:, None], state.factor)), (codes.T, values.T))
            for q, trial in trials:
                delta = trial - here
                gain = ((2 * slope + delta @ block) * delta).sum(1)
                better = gain < best
                best = torch.where(better, gain, best)
                best_value = torch.where(better[:, None], trial, best_value)
                best_codes = torch.where(better[:, None], q, best_codes)
                best_scale = torch.where(_rows(better, s), s, best_scale)
        state.gradient.addmm_(best_value - here, H[span])
        state.value[:, span] = best_value
        state.codes[:, span] = best_codes
        state.scale[:, g] = best_scale


def _rows(chosen: Tensor, scale: Tensor) -> Tensor:
    """Chosen rows [N] beside scales [N], or [N, 2] where a group has a minimum too."""
    return chosen if scale.dim() == 1 else chosen[:, None]


def corrected_target(
    w: Tensor, hessian: Tensor, cross: Tensor, residual: Tensor | None, d: Damped
) -> Tensor:
    """Weight that reproduces the parent from the inputs the quantized model
    really has, by least squares.

    hessian = E[x̂ x̂ᵀ], cross = E[x x̂ᵀ] with the parent's input x, residual =
    E[(r − r̂) x̂ᵀ] with the residual stream r
    that the output is added to: W* = W + (W (cross − hessian) + residual)(hessian + δI)⁻¹, δ and
    the inverse those of `d`. Rounding W* in the metric of `hessian` then minimises the error
    against the parent's output (the asymmetric objective of GPTAQ, arXiv 2504.02692, in closed
    form), and the residual term lets o_proj and down_proj absorb what earlier layers got wrong.
    """
    drift = torch.empty_like(w)
    for start in range(0, len(hessian), SOLVER_ROWS):
        span = slice(start, start + SOLVER_ROWS)
        drift[:, span] = w @ (cross[:, span] - hessian[:, span])
    if residual is not None:
        drift += residual
    U, ordered = d.inverse_factor, drift[:, d.order]
    torch.mm(ordered @ U.T, U, out=ordered)  # H⁻¹ = Uᵀ U in the order of feedback
    drift[:, d.order] = ordered
    return drift.add_(w)
