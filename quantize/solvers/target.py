"""What the rounding of a linear aims at: its weight, corrected for what its inputs have drifted.

A correction by least squares fits noise as well as drift: with 16,000 tokens and 2,048 inputs an eighth of
whatever the residual stream lacks, related to these inputs or not. On Gemma 3 270M that took the KL
divergence on the calibration text to a seventh of that on other text. So it is taken as far as windows
confirm it that it was not fitted to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantize.cost.footprint import SOLVER_ROWS
from quantize.solvers.feedback import Damped


@dataclass(frozen=True)
class Windows:
    """Tokens of a few whole windows, as they stand in the moments: what was fitted to all windows can
    be judged by them as if they had been left out."""

    x: Tensor
    """x̂ [S, K], times the root of each token's weight."""
    parent: Tensor | None
    """The parent's inputs x [S, K], where `cross` is known."""
    wanted: Tensor | None
    """y + r − r̂ [S, N], where `wanted` is known; both times the same roots."""


@dataclass(frozen=True)
class LeftOut:
    """Windows, and what leaves them out of a fit to all tokens: the same for all linears that have
    these inputs."""

    windows: Windows
    factor: Tensor | None
    """Lower Cholesky factor [S, S] of I − X (H + δI)⁻¹ Xᵀ / n, X [S, K] their inputs; None where some
    token is alone in its direction, so that nothing can be said without it."""

    @classmethod
    def of(cls, windows: Windows, tokens: int, d: Damped) -> LeftOut:
        """tokens: n, those that the moments behind `d` are means over, `windows` among them."""
        seen = windows.x[:, d.order] @ d.inverse_factor.T
        inside = (seen @ seen.T).div_(-tokens)
        del seen
        inside.diagonal().add_(1)
        factor, failed = torch.linalg.cholesky_ex(inside)
        return cls(windows, None if failed else factor)

    def share(self, w: Tensor, drift: Tensor) -> float:
        """The factor in 0 … 1 by which a correction fitted without the windows explains what they lack
        best. w, and the correction that was fitted to all tokens: [N, K].

        Nothing is fitted again: what a ridge regression predicts for tokens X that are left out follows
        from its residuals e on them, (I − X (H + δI)⁻¹ Xᵀ / n)⁻¹ e (Allen's PRESS for several rows at
        once).
        """
        if self.factor is None:
            return 1.0
        x, parent = self.windows.x, self.windows.parent
        aim = self.windows.wanted if parent is None else parent @ w.T
        assert aim is not None
        lacking = aim - x @ w.T
        left_out = torch.cholesky_solve(lacking - x @ drift.T, self.factor)
        predicted = lacking - left_out
        size = predicted.square().sum()
        return float(((predicted * lacking).sum() / size).clamp(0, 1)) if size > 0 else 1.0


def corrected_target(
    w: Tensor,
    hessian: Tensor,
    cross: Tensor | None,
    wanted: Tensor | None,
    d: Damped,
    left_out: LeftOut | None = None,
) -> tuple[Tensor, float]:
    """Weight [N, K] that reproduces the parent from the inputs the quantized model really has, by least
    squares; and the share of the correction that is in it: what `left_out` confirms, without it all, 1.

    hessian = E[x̂ x̂ᵀ]. What the linear should give, t, is known by `wanted` = E[t x̂ᵀ], or, where
    that is W x of the parent's input x, by cross = E[x x̂ᵀ]. W* = W + E[(t − W x̂) x̂ᵀ] (H + δI)⁻¹,
    δ and the inverse those of `d`. Rounding W* in the metric of `hessian` then minimises the error
    against the parent's output (the asymmetric objective of GPTAQ, arXiv 2504.02692, in closed
    form); a t that has in it what the residual stream lacks lets o_proj and down_proj absorb what
    earlier layers got wrong.
    """
    drift = _drift(w, hessian, cross, wanted, d)
    share = 1.0 if left_out is None else left_out.share(w, drift)
    return drift.mul_(share).add_(w), share


def _drift(
    w: Tensor, hessian: Tensor, cross: Tensor | None, wanted: Tensor | None, d: Damped
) -> Tensor:
    drift = torch.empty_like(w)
    for start in range(0, len(hessian), SOLVER_ROWS):
        span = slice(start, start + SOLVER_ROWS)
        if wanted is not None:
            torch.addmm(wanted[:, span], w, hessian[:, span], alpha=-1, out=drift[:, span])
        elif cross is not None:
            drift[:, span] = w @ (cross[:, span] - hessian[:, span])
    return d.solve_(drift)
