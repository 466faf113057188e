"""Which blocks become mixtures of experts, and how many experts a token visits in
each: measured end to end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quantize.block.capture import inputs_of
from quantize.block.standin import stand_in
from quantize.block.walk import Route, Streams, walk
from quantize.errors import ModelError
from quantize.methods.ladimo.budget import Budget, Levels
from quantize.methods.ladimo.dense import Ffn
from quantize.methods.ladimo.lesson import Lesson, Outlet
from quantize.methods.ladimo.routing import Budget as Visits
from quantize.methods.ladimo.split import Construction, Split
from quantize.methods.ladimo.trial import Start, Trial, dense_ffn, untrained
from quantize.model.dense_ffn import dense_ffn_of

if TYPE_CHECKING:
    from quantize.block.block import Block
    from quantize.block.view import ModelView

Prefix = tuple[float | None, ...]
"""What became of each block so far: its level, None where it is dense. Plans that agree
on it share hidden states."""

# Reductions whose error is measured beside the one that was asked for, for the report: each costs
# one more plan in the pass over the calibration text.
_CURVE = (0.1, 0.2, 0.3, 0.4)

# Logits that a plan is measured on: all of the text for vocabularies up to 131,072; of larger ones
# every second token or fewer, since some forty plans go through the head.
_LOGITS = 1 << 29
_LOGITS_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Found:
    """The chosen levels and what was measured on the way."""

    levels: dict[int, float]
    alone: dict[int, float]
    """Block → KL(parent ‖ model with this block alone converted), nats per token."""
    expected: float
    """KL of the chosen levels, untrained."""
    uniform: tuple[float, float]
    """The level that saves enough if all blocks have it, and its KL, untrained."""
    curve: dict[float, float]
    """Reduction → KL of the levels chosen for it, untrained."""
    adaptive: float | None = None
    """KL of what would be chosen if blocks could differ in how many experts a token
    visits, where they cannot."""

    def as_json(self) -> dict[str, Any]:
        """For the provenance."""
        return {
            "mean_experts": {str(index): mean for index, mean in self.levels.items()},
            "kl_alone": {str(index): kl for index, kl in self.alone.items()},
            "kl_untrained": self.expected,
            "everywhere": self.uniform[0],
            "kl_untrained_everywhere": self.uniform[1],
            "kl_untrained_adaptive": self.adaptive,
            "curve": {str(reduction): kl for reduction, kl in self.curve.items()},
        }


@dataclass(frozen=True)
class Searcher:
    """Search over one model under one budget. All measurements are on conversions without training.

    A conversion's harm is measured end to end as KL(parent ‖ converted) with one block
    converted at a middle level.
    Levels of a block are told apart by the error of its FFN's output, which needs no pass
    through the blocks behind it.
    The knapsack's choice is then measured in full and against the same with each block left dense:
    what a block costs among the others corrects what it costs alone, and a second choice is made.
    The best of both and of the same level everywhere is taken.
    """

    model: ModelView
    budget: Budget
    construction: Construction
    adaptive: bool
    seed: int
    fits: dict[tuple[int, Visits], tuple[Split, Tensor]] = field(default_factory=dict, init=False)
    """How blocks were split and their experts ranked so far, by block and the visits ranked for."""

    @torch.no_grad()
    def search(self, reduction: float) -> Found:
        """Choose levels that save `reduction` of the activated parameters."""
        free = self._search([float(k) for k in range(self.budget.layout.n)], reduction)
        if self.adaptive:
            return free
        # One number of experts for all blocks: a container without policies holds no more.
        found = []
        for k in range(1, self.budget.layout.n):
            if (
                self.budget.reduction(dict.fromkeys(range(self.budget.blocks), float(k)))
                >= reduction
            ):
                found.append(self._search([float(k)], reduction))
        if not found:
            raise ModelError(
                f"activated_reduction {reduction:g} is out of reach with one number of experts in "
                "all blocks (policy: top-k); lower it, set smaller experts, or use policy: "
                "adaptive"
            )
        return replace(min(found, key=lambda one: one.expected), adaptive=free.expected)

    def _search(self, levels: Sequence[float], reduction: float) -> Found:
        n = self.budget.blocks
        middle = levels[len(levels) // 2]
        errors: dict[tuple[int, float], float] = {}
        alone = self._measure([{index: middle} for index in range(n)], levels, errors)
        harm = [
            {mean: alone[i] * errors[i, mean] / max(errors[i, middle], 1e-30) for mean in levels}
            for i in range(n)
        ]
        first = self.budget.choose(harm, reduction)
        reductions = [share for share in _CURVE if self._reachable(levels, share)]
        plans = [first, *({i: m for i, m in first.items() if i != left} for left in first)]
        plans += [self.budget.choose(harm, share) for share in reductions]
        uniform = self._uniform(levels, reduction)
        kls = self._measure([*plans, uniform], levels)
        for kl, left in zip(kls[1:], first, strict=False):
            among = max(kls[0] - kl, 0.0)
            scale = among / max(harm[left][first[left]], 1e-30)
            harm[left] = {mean: found * scale for mean, found in harm[left].items()}
        second = self.budget.choose(harm, reduction)
        candidates = [(kls[0], first), (kls[-1], uniform)]
        if second != first:
            candidates.append((self._measure([second], levels)[0], second))
        expected, chosen = min(
            (c for c in candidates if self.budget.reduction(c[1]) >= reduction), key=lambda c: c[0]
        )
        curve = dict(zip(reductions, kls[1 + len(first) : -1], strict=True))
        return Found(chosen, dict(enumerate(alone)), expected, (uniform[0], kls[-1]), curve)

    def _reachable(self, levels: Sequence[float], reduction: float) -> bool:
        return (
            self.budget.reduction(dict.fromkeys(range(self.budget.blocks), levels[0])) >= reduction
        )

    def _uniform(self, levels: Sequence[float], reduction: float) -> dict[int, float]:
        """The highest level that, in every block, saves enough."""
        blocks = range(self.budget.blocks)
        enough = [
            mean
            for mean in levels
            if self.budget.reduction(dict.fromkeys(blocks, mean)) >= reduction
        ]
        return dict.fromkeys(blocks, max(enough))

    def _measure(
        self,
        plans: Sequence[Levels],
        levels: Sequence[float],
        errors: dict[tuple[int, float], float] | None = None,
    ) -> list[float]:
        """KL of every plan, on the windows that stay finite under all of them.

        errors: where given, takes the relative output error of every block's FFN at every level,
        on the parent's hidden states.
        """
        blocks = self.budget.blocks
        streams: Streams[Prefix] = Streams({(): list(self.model.hidden)}, self.model.ranks)

        def open_next(index: int) -> Block:
            self.model.progress("searching", index, blocks)
            return self.model.open(index, streams.batches[_prefix({}, index)])

        def visit(block: Block) -> Mapping[Prefix, Route[Prefix]]:
            index = block.index
            trials = self._trials(block, levels, errors)
            # The parent's own stream goes on whether a plan asks for it or not.
            wanted = [{}, *plans]
            steps = dict.fromkeys((_prefix(plan, index), plan.get(index)) for plan in wanted)
            return {
                (*key, mean): (key, partial(_outputs, block, trials[mean])) for key, mean in steps
            }

        walk(streams, range(blocks), open_next, visit)
        after = streams.batches
        return self._kls(
            after[_prefix({}, blocks)], [after[_prefix(plan, blocks)] for plan in plans]
        )

    def _trials(
        self, block: Block, levels: Sequence[float], errors: dict[tuple[int, float], float] | None
    ) -> dict[float | None, Trial | None]:
        place, index = dense_ffn_of(block.arch), block.index
        x = torch.cat([inputs for (inputs,) in inputs_of(block, [place])])
        x = x[x.isfinite().all(dim=1)]
        if not len(x):
            raise ModelError(
                f"{block.full_name(place)}: no finite calibration inputs; try --dtype float32"
            )
        ffn = dense_ffn(block)
        lesson = cache(partial(_own_outputs, block, ffn, x))
        middle = Visits.plain(levels[len(levels) // 2])
        # One ranking of the experts serves all levels, and one split and ranking all passes.
        if (index, middle) not in self.fits:
            start = Start.of(ffn, lesson(), self.budget.layout, self.construction, self.seed)
            self.fits[index, middle] = start.split, start.router(middle, self.seed)
        split, router = self.fits[index, middle]
        students = {mean: untrained(ffn, split, router, Visits.plain(mean), x) for mean in levels}
        if errors is not None:
            errors |= {(index, mean): lesson().error(one) for mean, one in students.items()}
        return {None: None} | {mean: Trial(student) for mean, student in students.items()}

    def _kls(self, parent: Sequence[Tensor], plans: Sequence[Sequence[Tensor]]) -> list[float]:
        """KL(parent ‖ plan) in nats per token, of every plan's hidden states, batch by batch
        [B, T, D]; on the same tokens for all."""
        vocabulary = self.model.log_probs(parent[0][:1, :1]).shape[-1]
        every = max(1, math.ceil(vocabulary * sum(map(_tokens, parent)) / _LOGITS))
        rows = max(1, _LOGITS_AT_ONCE // vocabulary)
        totals, tokens = [0.0] * len(plans), 0
        for batch, ours in enumerate(parent):
            theirs = [_rows(plan[batch])[::every] for plan in plans]
            for first, states in enumerate(torch.split(_rows(ours)[::every], rows)):
                p = self.model.log_probs(states[None])
                share = p.exp()
                for number, plan in enumerate(theirs):
                    q = self.model.log_probs(plan[None, first * rows : (first + 1) * rows])
                    totals[number] += float((share * (p - q)).double().sum())
                tokens += len(states)
        return [total / tokens for total in totals]


def _tokens(states: Tensor) -> int:
    return states.shape[0] * states.shape[1]


def _rows(states: Tensor) -> Tensor:
    """[B, T, D] → [B T, D]."""
    return states.reshape(-1, states.shape[-1])


def _prefix(plan: Levels, blocks: int) -> Prefix:
    """What a plan does to the blocks before the given one; that of the parent is empty."""
    return tuple(plan.get(index) for index in range(blocks))


def _own_outputs(block: Block, ffn: Ffn, x: Tensor) -> Lesson:
    """To do for inputs [M, D] what the FFN does."""
    outlet, y = Outlet.of(block, ffn), ffn(x)
    return Lesson(x, y if outlet is None else outlet.after(y), outlet)


def _outputs(block: Block, trial: Trial | None, hidden: Tensor) -> Tensor:
    """Outputs of a block whose FFN is tried; None: of the block as it is."""
    with stand_in(block.module, {dense_ffn_of(block.arch): trial} if trial else {}):
        return block.forward(block.module, hidden)
