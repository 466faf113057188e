"""A conversion with clocks around its parts: the run of a trial."""

from __future__ import annotations

import types
from collections.abc import Mapping, MutableSequence, Sequence
from typing import Any

from torch import Tensor

from quantize.block.block import Block
from quantize.block.moments import Moments
from quantize.block.statistics import PROFILED_TOKENS
from quantize.block.walk import Route, Streams
from quantize.conversion.conversion import QUANTIZED, REFERENCE, Conversion
from quantize.conversion.plan import Plan
from quantize.conversion.source import embed_windows, hold
from quantize.conversion.trial_fits import Clock, Fit, Fits
from quantize.methods.base import Stage
from quantize.methods.encode import Encode

AROUND = "around the stages"
"""The part that no other one counts: what is left of the time of a block."""


class TimedRun(Conversion):
    """A conversion with clocks around its parts."""

    clock: Clock
    fits: Fits
    reads: dict[str, tuple[int | None, bool]]
    """Tokens that a part reads at most, and whether every one meets all of its window."""

    @classmethod
    def of(cls, plan: Plan, clock: Clock, fits: Fits, tokens: int = 0) -> TimedRun:
        """A timed conversion, with stages as a first run of so many tokens needs them."""
        named = {
            f"{place + 1}. {stage.method}": stage for place, stage in enumerate(plan.recipe.stages)
        }
        stages = tuple(
            _with_clock(stage.for_trial(tokens), part, clock, fits) for part, stage in named.items()
        )
        out = cls(plan.decide(recipe=plan.recipe.model_copy(update={"stages": stages})))
        out.clock, out.fits = clock, fits
        # The search for the cache's scales computes attention alone.
        out.reads = {
            part: (stage.tokens_read, stage.kind == "cache") for part, stage in named.items()
        }
        out.reads["profiles"] = (PROFILED_TOKENS, False)
        out.reads |= dict.fromkeys(("reading", "writing", AROUND), (0, False))
        return out

    @property
    def needs_parent(self) -> bool:
        """Whether the parent's hidden states are taken along."""
        return any(stage.needs_parent for stage in self.plan.recipe.stages)

    def hidden(self, windows: Tensor) -> list[Tensor]:
        """Token windows [B, T] → hidden states [b, T, D], batch by batch."""
        return list(embed_windows(self.plan, windows))

    def streams(self, windows: Tensor) -> Streams[str]:
        """What enters a block."""
        names = (QUANTIZED, REFERENCE) if self.needs_parent else (QUANTIZED,)
        batches = {name: hold(self.plan, self.hidden(windows)) for name in names}
        out = _TimedStreams(batches, self.plan.request.ranks)
        out.clock = self.clock
        return out

    def open(
        self,
        index: int,
        inputs: MutableSequence[Tensor],
        parent_inputs: MutableSequence[Tensor] | None = None,
    ) -> Block:
        """Load one block."""
        with self.clock.lap("reading"):
            return super().open(index, inputs, parent_inputs)

    def profile(self, block: Block) -> dict[str, dict[str, Any]]:
        """Outliers of a block as it is now."""
        with self.clock.lap("profiles"):
            return super().profile(block)


class _TimedStreams(Streams[str]):
    clock: Clock

    def advance(self, index: int, routes: Mapping[str, Route[str]]) -> None:
        """Replace every batch by the block's outputs."""
        with self.clock.lap("passes to the next block"):
            super().advance(index, routes)


def _with_clock(stage: Stage, part: str, clock: Clock, fits: Fits) -> Stage:
    """The same stage with a clock around `apply`, its fits of weights left to `fits`."""
    plain = type(stage)

    def apply(self: Stage, block: Block) -> None:
        spent = fits.spent
        with clock.lap(part):
            plain.apply(self, block)
        clock.parts[part] -= fits.spent - spent

    def encode_group(
        self: Encode, block: Block, names: Sequence[str], moments: Moments | None
    ) -> None:
        fits.take(Fit(self, plain, block, tuple(names), moments), part)

    body: dict[str, Any] = {"apply": apply}
    if isinstance(stage, Encode):
        body["encode_group"] = encode_group
    kind: Any = types.new_class(
        plain.__name__, (plain,), {}, lambda namespace: namespace.update(body)
    )
    timed: Stage = kind.model_construct(
        **{name: getattr(stage, name) for name in plain.model_fields}
    )
    return timed
