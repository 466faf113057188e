"""Channel scales under which a grid of group scales leaves the least error behind error feedback.

Scaling input channel j of a linear by λ_j and its inputs by 1/λ_j changes no output, but it changes what
rounding costs (cross-layer equalization, Nagel et al., arXiv 1906.04721; AWQ, arXiv 2306.00978). A group's
step grows with its largest weights, and the error of a channel counts by what error feedback cannot move
into other channels: the part of its input that those rounded later do not tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantize.solvers.feedback import Damped, damp, error_feedback, feedback_order, undamped
from quantize.solvers.grid import Grid
from quantize.solvers.products import quadratic

# Rounds at most; on linears of a Gemma 3 270M seven to twelve settled it.
_STEPS = 40
# Largest relative change of a step that ends them.
_SETTLED = 2e-3
# Weights looked at at once: what is tried on them stays in a core's cache.
_PIECE = 1 << 18

_TINY = 1e-30


@dataclass(frozen=True)
class Rows:
    """Rows of a linear that a scale moves into."""

    weight: Tensor
    """float32 [N, K]"""
    share: float
    """By what the squared error of their outputs counts."""

    @classmethod
    def of(cls, weight: Tensor, hessian: Tensor) -> Rows:
        """Errors of these rows, float32, relative to the mean square of their output, tr(W H Wᵀ)."""
        size = float(quadratic(weight, hessian).sum())
        return cls(weight, 1 / max(size, torch.finfo(torch.float32).tiny))


@dataclass(frozen=True)
class Feedback:
    """What error feedback may do with inputs of given second moments, however their channels are scaled."""

    usable: Damped
    """Of the Hessian under `spread`."""
    alone: Tensor
    """Mean square [K] of every input under `spread`, damped: what a unit error costs that nothing makes up for."""
    spread: Tensor
    """Scale [K] of the columns under which their weights are of one size: by it the Hessian was damped, so
    that a channel of large inputs and small weights does not set what is added to the others."""

    @classmethod
    def of(cls, hessian: Tensor, spread: Tensor, damping: float) -> Feedback | None:
        """hessian: E[x xᵀ] [K, K] of the inputs as they are; None where it cannot be factored."""
        balanced = hessian / spread
        balanced /= spread[:, None]
        usable = damp(balanced, damping, feedback_order(balanced, "activation"))
        if usable is None:
            return None
        # An input that was always zero stood in H as a mean one, so that it could be factored.
        alone = balanced.diagonal() + usable.delta
        return cls(usable, alone, spread)

    def left(self, reach: float) -> Tensor:
        """Mean square [K] by which a unit error of weight j errs once those that are rounded later made up for it.

        At reach 1 as well as they can: Var(x_j | inputs rounded later) = 1 / U_jj², and the squares add up to the
        error exactly. At 0 not at all. But a weight that makes up for many others leaves the range of
        its group and errs by more than a step; where much is made up for, the geometric mean between
        is nearer to what happens.
        """
        feedback = torch.empty_like(self.alone)
        feedback[self.usable.order] = self.usable.inverse_factor.diagonal() ** -2
        feedback = torch.where(self.usable.dead, self.alone, feedback)
        return feedback**reach * self.alone ** (1 - reach) * self.spread.square()

    def under(self, columns: Tensor) -> Damped:
        """The factor for inputs divided by `columns`: U Λ, since H becomes Λ⁻¹ H Λ⁻¹."""
        moved = (columns / self.spread)[self.usable.order]
        return replace(self.usable, inverse_factor=self.usable.inverse_factor * moved)


def equalize(
    weights: Sequence[Tensor],
    left: Tensor,
    group_size: int,
    norm: int,
    start: Tensor,
    columns: Callable[[Tensor], Tensor],
    sources: Callable[[Tensor], Tensor],
) -> Tensor:
    """λ per source channel that minimizes Σ_rows Σ_groups s² Σ_j left_j / λ_j².

    s is the p-norm of a group's scaled weights, to which its step is proportional (p = 2: to the mean square,
    ∞: the largest), and every code of the group errs by a step's square over 12. Where the derivative is zero, a
    channel's share of its group's errors is the share that its weights have in the group's steps; each round
    moves λ towards that balance by the power that reaches it at once where all rows are alike. How large λ is
    in one group beside another stays as it was.

    A row's squared errors count relative to the size of its weights under `start`, to the first power. Were they
    to count as they are, a few rows of outlier channels would decide; relative to its square, and the largest
    outputs would count no more than the smallest. Measured on two models, the mean of both is best.

    weights: [N, K] each; left: [K], above zero; norm: p, a power of two; start: λ per source channel, above zero.
    columns: λ per source channel → [K], repeated for those that share a source; sources: [K] → sums or
    means of what source channels have in their columns; only ratios of them count.
    """
    begin = columns(start)
    scale, best, lowest = start.clone(), start, float("inf")
    for _ in range(_STEPS):
        spread = columns(scale)
        cost = left / spread.square()
        errors = cost.view(-1, group_size).sum(dim=1)
        steps, pull = _steps(weights, spread, begin, group_size, norm)
        loss = float((steps * errors).sum())
        if loss < lowest:
            best, lowest = scale, loss
        of_errors = sources((steps[:, None] * cost.view(-1, group_size)).flatten())
        of_steps = sources((errors[:, None] * pull.view(-1, group_size)).flatten())
        change = (of_errors.clamp_min(_TINY) / of_steps.clamp_min(_TINY)).log() / (norm + 2)
        # A channel without weights has no balance to go to; it follows the others at the widest allowed.
        change = change.clamp(-1, 1)
        scale = scale * change.exp()
        if float(change.abs().max()) < _SETTLED:
            break
    return best


def _steps(
    weights: Sequence[Tensor], spread: Tensor, begin: Tensor, group_size: int, norm: int
) -> tuple[Tensor, Tensor]:
    """Σ_rows s² [G] of every group, and what each column has in it [K]; by rows of size 1 under `begin`."""
    K = len(spread)
    steps, pull = spread.new_zeros(K // group_size), spread.new_zeros(K)
    for linear in weights:
        for rows in torch.split(linear, max(1, _PIECE // K)):
            weight = rows.float()
            size = (weight * begin).square_().mean(dim=1, keepdim=True).sqrt_().clamp_min_(_TINY)
            scaled = (weight * spread).abs_().view(len(weight), -1, group_size)
            # Relative to the largest, or powers leave float32.
            largest = scaled.amax(dim=2, keepdim=True).clamp_min_(_TINY)
            scaled.div_(largest)
            for _ in range(norm.bit_length() - 1):
                scaled.square_()
            total = scaled.sum(dim=2)
            square = (total / group_size).pow_(2 / norm).mul_(largest[..., 0].square())
            square.div_(size)
            steps += square.sum(dim=0)
            pull += scaled.mul_((square / total.clamp_min(_TINY))[..., None]).sum(dim=0).flatten()
    return steps, pull


def feedback_error(
    linears: Iterable[Rows], columns: Tensor, feedback: Feedback, hessian: Tensor, grid: Grid
) -> float:
    """Output error of rounding W·diag(columns) with error feedback, rows counted by their share.

    hessian: E[x xᵀ] [K, K] of the input before λ moves into it.
    """
    usable = feedback.under(columns)
    importance = hessian.diagonal() / columns.square()
    rows = list(linears)
    # Rows know nothing of each other: one loop over the columns serves all linears.
    scaled = torch.cat([linear.weight for linear in rows]) * columns
    rounded, lost = error_feedback(scaled, usable, grid, *grid.fit_scale(scaled, importance))
    # Damping was added under `spread`.
    delta = (rounded.value(grid) - scaled) * (feedback.spread / columns)
    errors = torch.split(undamped(lost, delta, usable), [len(linear.weight) for linear in rows])
    return sum(
        linear.share * float(error.sum()) for linear, error in zip(rows, errors, strict=True)
    )
