"""Second moments of a linear's inputs, summed batch by batch."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantize.formats.fp8 import quantize_activations
from quantize.model.arch import Architecture
from quantize.parallel.ranks import ALONE, Ranks
from quantize.solvers.products import gram
from quantize.solvers.target import Windows


@dataclass
class Moments:
    """Second moments of one linear's inputs x̂ [K] over calibration tokens, in float32.

    The mean E is over the tokens that reach the linear; each of those routed to an expert counts
    the same; others count by their weights, where there are any (`token_weights`). Weighting those
    of experts by the square of their routing weights, as the block's output sees an
    expert's error, leaves fewer effective tokens, and on tokens not seen it made the output of
    randomly weighted experts worse (1 to 28 %), never better.
    """

    hessian: Tensor
    """E[x̂ x̂ᵀ] [K, K]."""
    absmean: Tensor
    """E|x̂| [K]."""
    cross: Tensor | None
    """E[x x̂ᵀ] [K, K] with the parent's input x; None where `wanted` is known."""
    wanted: Tensor | None
    """E[(y + r − r̂) x̂ᵀ] [N, K] for a linear whose output y, without a bias, is added to the
    residual stream r: what it should give for the sum to be the parent's."""
    tokens: int
    """Tokens that the means are over; without any, all moments are zero."""
    windows: Windows | None = None
    """Of the text, where the parent is known."""

    def forget_parent(self) -> None:
        """Keep only what is known about x̂."""
        self.cross = self.wanted = self.windows = None


@dataclass
class Sums:
    """Running totals of a pass over the calibration inputs of one linear with K inputs.

    Several ranks run different batches and add them in rounds; `complete` then gives all of them
    the totals.
    """

    fp8_activations: bool
    ranks: Ranks = ALONE
    totals: dict[str, Tensor] = field(default_factory=dict)
    tokens: int = 0
    dropped: int = 0
    """Tokens left out because something about them was not finite."""
    _kept: dict[int, Windows] = field(default_factory=dict)
    _shapes: dict[str, torch.Size] = field(default_factory=dict)

    def add(
        self,
        ours: tuple[Tensor, ...],
        theirs: tuple[Tensor, ...] | None = None,
        present: int = 1,
        weights: Tensor | None = None,
        keep: tuple[int, int] = (0, 0),
    ) -> None:
        """Add tokens. ours: the linear's inputs x̂ [M, K], before them the residual stream r̂ [M, N]
        where it is wanted.

        theirs: the parent's inputs x, or its residual stream r and the linear's outputs y [M, N];
        present: how many ranks add tokens in this round, the first ones; weights: how much each
        token counts [M], 1 in the mean; None: all the same. keep: the batch, and how many of its first
        tokens are also kept by themselves.
        """
        batch, kept = keep
        counts = self.ranks.rank < present
        # A token that overflowed would spoil the whole matrix. Sums tell at a fraction of the cost
        # whether there may be one: what is not finite stays so in them.
        seen = (*ours, *(theirs or ()))
        if not torch.stack([t.sum() for t in seen]).isfinite().all():
            finite = torch.stack([t.isfinite().all(dim=1) for t in seen]).all(dim=0)
            self.dropped += int((~finite).sum()) * counts
            kept = int(finite[:kept].sum())
            ours = tuple(t[finite] for t in ours)
            theirs = None if theirs is None else tuple(t[finite] for t in theirs)
            weights = None if weights is None else weights[finite]
        x = quantize_activations(ours[-1]) if self.fp8_activations else ours[-1]
        if weights is None:
            self._total("absmean", x.abs().sum(dim=0), present)
            self._total("hessian", gram(x), present)
        else:
            self._total("absmean", weights @ x.abs(), present)
            x = x * weights.sqrt()[:, None]
            self._total("hessian", gram(x), present)
        if theirs is not None:
            residual = len(ours) > 1
            aim = (theirs[0] - ours[0]).add_(theirs[1]) if residual else theirs[0]
            aim = aim if weights is None else aim * weights.sqrt()[:, None]
            self._total("wanted" if residual else "cross", aim.T @ x, present)
            if kept and counts:
                beside = (None, aim[:kept].clone()) if residual else (aim[:kept].clone(), None)
                self._kept[batch] = Windows(x[:kept].clone(), *beside)
        self.tokens += len(x) * counts

    def _total(self, key: str, value: Tensor, present: int) -> None:
        self._shapes[key] = value.shape
        self.totals[key] = self.ranks.add(self.totals.get(key), value, present)

    def complete(self, tokens: int, dropped: int) -> None:
        """Put the totals of all ranks together. tokens, dropped: those of all ranks."""
        self.totals = {
            key: self.ranks.whole(total, self._shapes[key]) for key, total in self.totals.items()
        }
        self.tokens, self.dropped = tokens, dropped
        self._kept = self._of_all_ranks() if self.ranks.size > 1 else self._kept

    def _of_all_ranks(self) -> dict[int, Windows]:
        mine = {
            f"{batch}.{name}": tensor
            for batch, windows in self._kept.items()
            for name, tensor in vars(windows).items()
            if tensor is not None
        }
        found: dict[str, Tensor] = {}
        for rank in range(self.ranks.size):
            found |= self.ranks.tensors(mine, rank)
        return {
            batch: Windows(
                found[f"{batch}.x"], found.get(f"{batch}.parent"), found.get(f"{batch}.wanted")
            )
            for batch in {int(key.partition(".")[0]) for key in found}
        }

    def mean(self) -> Moments:
        """The moments of all tokens added; takes the totals, of which a large layer has
        gigabytes."""
        mean = {key: total.div_(max(1, self.tokens)) for key, total in self.totals.items()}
        self.totals = {}
        kept = [self._kept[batch] for batch in sorted(self._kept)]
        self._kept = {}
        return Moments(
            mean["hessian"],
            mean["absmean"],
            mean.get("cross"),
            mean.get("wanted"),
            self.tokens,
            _together(kept),
        )


def _together(kept: list[Windows]) -> Windows | None:
    if not kept:
        return None
    parents = [one.parent for one in kept if one.parent is not None]
    wanted = [one.wanted for one in kept if one.wanted is not None]
    return Windows(
        torch.cat([one.x for one in kept]),
        torch.cat(parents) if parents else None,
        torch.cat(wanted) if wanted else None,
    )


def too_few(arch: Architecture, name: str, moments: Moments) -> str | None:
    """Why a routed expert's linear `name` cannot be fitted to its inputs: fewer tokens than inputs;
    None if it can."""
    inputs = len(moments.hessian)
    if not arch.is_routed(name) or moments.tokens >= inputs:
        return None
    return f"saw {moments.tokens} tokens for {inputs} inputs"
