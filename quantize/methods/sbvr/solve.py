"""Bit-vector weights in the Hessian's metric: codes, lines and coefficients in
turn, each by its own descent.

All functions minimise tr((Ŵ − W) H (Ŵ − W)ᵀ) of one linear, W [N, K], H = E[x xᵀ]
[K, K]. Codes: GPTQ error feedback,
then coordinate descent. Lines: every group tries the line that suits what the rest of its
row leaves it. Coefficients: least squares over all lines of the codebook at once. The
order of steps is that of BPDQ (arXiv 2602.04163), whose groups have coefficients of their
own; here they share a codebook.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantize.formats.bitvec import coefficients, levels
from quantize.methods.sbvr.fit import Codebook, assign
from quantize.solvers.feedback import Damped, damp, feed_back, feedback_order, move_codes
from quantize.solvers.products import quadratic

# Descent ends with a sweep that gains less: the next would cost as much and gain less still.
_MIN_GAIN = 0.005
# Of conjugate gradients. Each costs one product [N, K] × [K, K]; the refit need not be exact, since
# lines and codes move after it.
_REFIT_STEPS = 6
# Weights that they look at, by whole rows: thousands for each coefficient.
_REFIT_WEIGHTS = 1 << 22
# Of the mean diagonals: keeps the preconditioner invertible, which float64 needs little for.
_RIDGE = 1e-6
_BOOKS = 1 << 24  # bytes of books that are kept at once
_PIECE = 1 << 22  # weights looked up at once: 32 MB of places in 64 bits


@dataclass(frozen=True)
class LineBook:
    """Values that R rows may take within one group: those of the line each row uses there."""

    values: Tensor
    """[R, 2^bits], rising."""
    middles: Tensor
    """[R, 2^bits − 1]: what lies halfway between neighbours of them."""
    codes: Tensor
    """[R, 2^bits]: the codes of these values."""

    def round(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest codes of w [M, R] → (codes, values), float32 of the same shape."""
        rank = torch.searchsorted(self.middles, w.T.contiguous())
        return self.codes.gather(1, rank).T.float(), self.values.gather(1, rank).T


class LineBooks:
    """The books of all groups under index [N, G]; each is looked up when it is asked for, and kept
    until there are many: error feedback comes to the groups in any order."""

    def __init__(self, codebook: Codebook, index: Tensor) -> None:
        self.index = index.long()
        self.values, self.codes = codebook.levels.sort(dim=1)
        self.middles = (self.values[:, 1:] + self.values[:, :-1]) / 2
        size = len(index) * self.values.shape[1] * (2 * self.values.itemsize + self.codes.itemsize)
        self._most = max(1, _BOOKS // size)
        self._books: dict[int, LineBook] = {}

    def __getitem__(self, group: int) -> LineBook:
        """The book of `group`."""
        if group not in self._books:
            if len(self._books) >= self._most:
                del self._books[next(iter(self._books))]
            rows = self.index[:, group]
            self._books[group] = LineBook(self.values[rows], self.middles[rows], self.codes[rows])
        return self._books[group]


@dataclass
class Fitted:
    """Codes [N, K] (float32 whole numbers) and lines [N, G] under a codebook,
    with what follows from them."""

    codebook: Codebook
    index: Tensor
    codes: Tensor
    group_size: int

    def lookup(self, table: Tensor) -> Tensor:
        """Entries [N, K] of a table [L, 2^bits] of the lines, at the codes."""
        out = table.new_empty(self.codes.shape)
        for rows in pieces(self.codes):
            out[rows] = table.flatten()[self.places(rows)]
        return out

    def places(self, rows: slice) -> Tensor:
        """Where the weights of some rows [R, K] are looked up in a flattened
        table [L, 2^bits], int64."""
        index = (
            self.index[rows]
            .long()
            .repeat_interleave(self.group_size, dim=1)[:, : self.codes.shape[1]]
        )
        return (index << self.codebook.bits) + self.codes[rows].long()

    @property
    def value(self) -> Tensor:
        """Quantized weight [N, K]."""
        return self.lookup(self.codebook.levels)

    def copy(self) -> Fitted:
        """With tensors of its own."""
        return Fitted(self.codebook, self.index.clone(), self.codes.clone(), self.group_size)


def pieces(matrix: Tensor) -> Iterator[slice]:
    """Rows of a matrix [N, K], as many at a time as `_PIECE` weights have: work space
    in 64 bits must stay small."""
    rows = max(1, _PIECE // matrix.shape[1])
    for first in range(0, len(matrix), rows):
        yield slice(first, first + rows)


def solve(
    target: Tensor,
    usable: Damped,
    metric: Tensor,
    start: tuple[Codebook, Tensor],
    group_size: int,
    sweeps: int,
) -> Fitted:
    """Fit bit vectors to target [N, K] in the damped Hessian `metric` [K, K], from
    a codebook and index [N, G].

    Every sweep refits coefficients, moves lines, then codes; the loss never grows. Ends early once
    a sweep gains less than half a percent.
    """
    codebook, index = start
    codes, _ = feed_back(target, usable, LineBooks(codebook, index), group_size)
    best = Fitted(codebook, index.clone(), codes, group_size)
    value = best.value
    gradient = (value - target) @ metric
    before = _loss(target, value, gradient)
    for _ in range(sweeps):
        fitted, value, gradient = _refit(target, best.copy(), value, gradient, metric)
        _move_lines(fitted, value, gradient, metric)
        move_codes(
            fitted.codes,
            value,
            gradient,
            metric,
            LineBooks(fitted.codebook, fitted.index),
            group_size,
        )
        after = _loss(target, value, gradient)
        if after < before:
            best = fitted
        if after > before * (1 - _MIN_GAIN):
            break
        before = after
    return best


def loss(target: Tensor, fitted: Fitted, metric: Tensor) -> float:
    """tr((Ŵ − W) H (Ŵ − W)ᵀ) of target [N, K] in the metric H [K, K]."""
    return float(quadratic(fitted.value.sub_(target), metric).sum(dtype=torch.float64))


def _loss(target: Tensor, value: Tensor, gradient: Tensor) -> float:
    """The same, of a value Ŵ whose gradient (Ŵ − W) H [N, K] is known."""
    return sum(
        float(((value[rows] - target[rows]) * gradient[rows]).sum(dtype=torch.float64))
        for rows in pieces(value)
    )


def _move_lines(fitted: Fitted, value: Tensor, gradient: Tensor, H: Tensor) -> None:
    """Let every group try another line, its codes by error feedback within the group;
    the rest of the row is fixed.

    The line is the nearest one to the values that would be best if they were free. value and
    gradient (Ŵ − W) H [N, K] are kept up to date.
    """
    G, K = fitted.group_size, value.shape[1]
    for g, first in enumerate(range(0, K, G)):
        span = slice(first, min(first + G, K))
        block = H[span, span]
        here = value[:, span]
        slope = gradient[:, span]
        d = damp(block, 0, feedback_order(block, "activation"))
        if d is None:
            continue
        free = here - d.solve_(slope.clone())
        other = assign(free, fitted.codebook, G, block.diagonal())
        best = torch.zeros_like(here[:, 0])
        values = here.clone()
        codes = fitted.codes[:, span].clone()
        lines = fitted.index[:, g].clone()
        for index in (other, fitted.index[:, g : g + 1]):
            books = LineBooks(fitted.codebook, index)
            trial_codes, _ = feed_back(free, d, books, G)
            trial = Fitted(fitted.codebook, index, trial_codes, G).value
            delta = trial - here
            gain = ((2 * slope + delta @ block) * delta).sum(dim=1)
            better = gain < best
            best = torch.where(better, gain, best)
            values = torch.where(better[:, None], trial, values)
            codes = torch.where(better[:, None], trial_codes, codes)
            lines = torch.where(better, index[:, 0], lines)
        gradient.addmm_(values - here, H[span])
        value[:, span] = values
        fitted.codes[:, span] = codes
        fitted.index[:, g] = lines


def _refit(
    target: Tensor, fitted: Fitted, value: Tensor, gradient: Tensor, H: Tensor
) -> tuple[Fitted, Tensor, Tensor]:
    """Coefficients by least squares over the whole codebook, with the value and the gradient (Ŵ − W) H
    [N, K] that follow from them.

    Preconditioned conjugate gradients on the shapes [S, C], over as many rows as tell them.
    """
    some = slice(None, None, max(1, value.numel() // _REFIT_WEIGHTS))
    design = _Design(replace(fitted, index=fitted.index[some], codes=fitted.codes[some]))
    theta = fitted.codebook.lines.double()
    residual = -design.adjoint(gradient[some])
    inverse = design.preconditioner(H.diagonal().clone())
    step = torch.zeros_like(theta)
    preconditioned = (inverse @ residual[:, :, None])[:, :, 0]
    direction, size = preconditioned, float((residual * preconditioned).sum())
    for _ in range(_REFIT_STEPS):
        image = design.adjoint(design.forward(direction) @ H)
        curvature = float((direction * image).sum())
        if curvature <= 0 or size <= 0:
            break
        step = step + direction * (size / curvature)
        residual = residual - image * (size / curvature)
        preconditioned = (inverse @ residual[:, :, None])[:, :, 0]
        before, size = size, float((residual * preconditioned).sum())
        direction = preconditioned + direction * (size / before)
    codebook = replace(fitted.codebook, lines=(theta + step).half().float())
    if not bool(torch.isfinite(codebook.lines).all()):
        return fitted, value, gradient
    moved = replace(fitted, codebook=codebook)
    new = moved.value
    slope = (new - target) @ H
    if _loss(target, new, slope) < _loss(target, value, gradient):
        return moved, new, slope
    return fitted, value, gradient


class _Design:
    """The linear map from shapes [S, C] to the weight [N, K] under
    fixed codes, lines and scales."""

    def __init__(self, fitted: Fitted) -> None:
        codebook, codes = fitted.codebook, fitted.codes
        self.fitted, self.scales = fitted, codebook.scales
        self.places = torch.empty(codes.shape, dtype=torch.int32, device=codes.device)
        for rows in pieces(codes):
            self.places[rows] = fitted.places(rows)
        self.table = (len(codebook.lines), len(codebook.scales), 1 << codebook.bits)
        every = torch.arange(1 << codebook.bits, device=codes.device)
        bits = [every >> k & 1 for k in range(codebook.bits)]
        bias = [torch.ones_like(every)] * (codebook.lines.shape[1] - codebook.bits)
        self.basis = torch.stack([*bits, *bias], dim=1).double()  # [2^bits, C]

    def forward(self, theta: Tensor) -> Tensor:
        """θ [S, C] → its weights [N, K], float32."""
        table = levels(coefficients(theta, self.scales), self.fitted.codebook.bits)
        return table.flatten()[self.places]

    def adjoint(self, weights: Tensor) -> Tensor:
        """Σ over the weights [N, K] that a coefficient is part of → [S, C], float64."""
        return self._totals(weights) @ self.basis

    def preconditioner(self, diagonal: Tensor) -> Tensor:
        """Inverses [S, C, C] of the normal equations of each line alone,
        inputs taken as uncorrelated."""
        sizes = self._totals(diagonal.expand_as(self.places), power=2)
        normal = torch.einsum("sq,qc,qd->scd", sizes, self.basis, self.basis)
        own = normal.diagonal(dim1=1, dim2=2).mean(dim=1)
        # A line that no group uses has no equations, but must have an inverse.
        ridge = (own + own.mean()).clamp_min(1e-30) * _RIDGE
        inverse: Tensor = torch.linalg.inv(
            normal + ridge[:, None, None] * torch.eye(normal.shape[1], device=normal.device)
        )
        return inverse

    def _totals(self, weights: Tensor, power: int = 1) -> Tensor:
        S, Z, C = self.table
        sums = torch.zeros(S * Z * C, dtype=torch.float64, device=weights.device)
        for rows in pieces(weights):
            at = self.places[rows].flatten()
            values = weights[rows].flatten().double()
            sums += torch.bincount(at, values, minlength=S * Z * C)
        return torch.einsum("szq,z->sq", sums.view(S, Z, C), self.scales.double() ** power)
