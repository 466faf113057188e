"""A conversion with clocks around its parts: the run of a trial."""

from __future__ import annotations

import types
from collections.abc import MutableSequence, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from quantize.block.block import Block
from quantize.block.moments import Moments
from quantize.block.statistics import PROFILED_TOKENS
from quantize.block.streams import Streams
from quantize.convert.conversion import Conversion
from quantize.convert.trial_fits import Clock, Fit, Fits
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
    def of(cls, run: Conversion, clock: Clock, fits: Fits, tokens: int = 0) -> TimedRun:
        """The same conversion, timed, with stages as a first run of so many tokens needs them."""
        named = {f"{place + 1}. {stage.method}": stage for place, stage in enumerate(run.request.recipe.stages)}
        stages = tuple(_timed(stage.for_trial(tokens), part, clock, fits) for part, stage in named.items())
        recipe = run.request.recipe.model_copy(update={"stages": stages})
        out = cls(replace(run.request, recipe=recipe), run.source, run.arch, run.shape, run.skeleton)
        out.clock, out.fits = clock, fits
        # The search for the cache's scales computes attention alone.
        out.reads = {part: (stage.tokens_read, stage.kind == "cache") for part, stage in named.items()}
        out.reads["profiles"] = (PROFILED_TOKENS, False)
        out.reads |= dict.fromkeys(("reading", "writing", AROUND), (0, False))
        return out

    @property
    def needs_reference(self) -> bool:
        """Whether the parent's hidden states are taken along."""
        return any(stage.needs_reference for stage in self.request.recipe.stages)

    def streams(self, windows: Tensor) -> Streams:
        """What enters a block."""
        out = _TimedStreams(
            self.keep(self.hidden(windows)), self.keep(self.hidden(windows)) if self.needs_reference else None
        )
        out.clock = self.clock
        return out

    def open(
        self,
        index: int,
        inputs: MutableSequence[Tensor],
        reference_inputs: MutableSequence[Tensor] | None = None,
    ) -> Block:
        """Load one block."""
        with self.clock.lap("reading"):
            return super().open(index, inputs, reference_inputs)

    def profile(self, block: Block) -> dict[str, dict[str, Any]]:
        """Outliers of a block as it is now."""
        with self.clock.lap("profiles"):
            return super().profile(block)


class _TimedStreams(Streams):
    clock: Clock

    def advance(self, block: Block) -> None:
        """Replace every batch by the block's outputs."""
        with self.clock.lap("passes to the next block"):
            super().advance(block)


def _timed(stage: Stage, part: str, clock: Clock, fits: Fits) -> Stage:
    """The same stage with a clock around `apply`, its fits of weights left to `fits`."""
    plain = type(stage)

    def apply(self: Stage, block: Block) -> None:
        spent = fits.spent
        with clock.lap(part):
            plain.apply(self, block)
        clock.parts[part] -= fits.spent - spent

    def encode_group(self: Encode, block: Block, names: Sequence[str], moments: Moments | None) -> None:
        fits.take(Fit(self, plain, block, tuple(names), moments), part)

    body: dict[str, Any] = {"apply": apply}
    if isinstance(stage, Encode):
        body["encode_group"] = encode_group
    kind: Any = types.new_class(plain.__name__, (plain,), {}, lambda namespace: namespace.update(body))
    timed: Stage = kind.model_construct(**{name: getattr(stage, name) for name in plain.model_fields})
    return timed
