"""Time of a conversion, from a trial of its own steps on this machine: a block of
every kind, with little text.

What reads text (forward passes, sums of products, searches) takes a + b·tokens: two
amounts of text give the line.
What fits weights does not depend on the text. It is measured on whole linears where the time allows
that; else on pieces of them, from which N rows of K inputs follow (`trial_fits`). The steps are those of
a conversion, with clocks around them; nothing is known here about any method.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from quantize.calibration.tokens import TokenSet
from quantize.conversion.allocation import SAMPLE_TOKENS, Space
from quantize.conversion.beside import part_sizes
from quantize.conversion.decide import decide
from quantize.conversion.held_out_cost import seconds_of_logits, seconds_of_passes
from quantize.conversion.plan import Plan
from quantize.conversion.source import embed_windows, open_block
from quantize.conversion.trial_fits import Clock, Fits
from quantize.conversion.trial_run import AROUND, TimedRun
from quantize.errors import OutputError
from quantize.files.writer import CheckpointWriter

CAP = 20.0
"""Seconds that a trial aims to stay below: what is told before a run of minutes
or hours may take no longer.

A single step is not cut short, so that a trial of a huge model on a
slow machine may take some more.
"""
_SPREAD_WHOLE, _SPREAD_REDUCED = 1.6, 2.5
"""Factors of the range told. Where all steps were run in full size, estimates of the reference
model lay within 1.6 of what conversions took on two busy cores; what follows from pieces has the
error of the scaling laws on top."""
_WARM = 1.0
"""Seconds below which a run is repeated, since the first one of a process takes longer."""
LOOK = "look at held-out windows"
"""The part that comes behind all blocks."""
_PROBED = 64
"""Tokens of the pass by which the amount of text is chosen: enough for its products to be no
single rows, and little time even for a slow machine."""
_PLANNED_WEIGHTS = 1 << 22
"""Weights of a block up to which rounding every linear, twice, takes seconds."""
_HASHED = 32 << 20
"""Bytes that the speed of hashing is measured on: some hundredths of a second."""


@dataclass(frozen=True)
class Timing:
    """Seconds that a conversion will take, measured on this machine now."""

    seconds: float
    """Of the whole conversion, but for what `not_counted` names."""
    seconds_per_block: float
    """Mean over the blocks."""
    seconds_low: float
    seconds_high: float
    seconds_by_part: dict[str, float]
    """What `seconds` consists of: stages by their place and method, and what stands around them."""
    trial_seconds: float
    """What the trial itself took."""
    reduced: list[str]
    """What was measured on less than a whole step of a conversion, and scaled up."""
    not_counted: list[str]
    """Work that the conversion does as well and that no trial can tell."""


def timing(
    plan: Plan,
    space: Space | None,
    tokens: TokenSet | None,
    opening: float,
    output: int,
    state: int,
) -> Timing:
    """Measure what a conversion takes.

    plan, space, tokens: as `quantize.conversion.draft.draft` gives them, in `opening` seconds.
    output: bytes of its weights. state: bytes of hidden states that it keeps after every block.
    Leaves nothing on the disk. Raises what the conversion raises on the same blocks.
    """
    started = time.monotonic()
    with _scratch() as folder:
        request = replace(plan.request, output=Path(folder) / "out", work=None, resume=None)
        available = 0 if tokens is None else tokens.tokens.numel()
        stages = tuple(stage.for_trial(available) for stage in plan.recipe.stages)
        recipe = plan.recipe.model_copy(update={"stages": stages})
        plan = replace(plan, request=request).decide(recipe=recipe)
        plan = decide(plan, None, tokens, lambda what, done, total: None)
        return _Trial(plan, space, tokens, started).timing(opening, output, state)


@contextmanager
def _scratch() -> Iterator[str]:
    """A folder that is gone afterwards. OutputError where there is no room for any."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="pq-trial-")
    except OSError as err:
        raise OutputError(
            f"no temporary folder ({err.strerror}); set TMPDIR, or use --no-time"
        ) from None
    with folder as name:
        yield name


@dataclass
class _Trial:
    """One trial. All of it keeps within the conversion's own limits of
    memory, of which it needs less."""

    plan: Plan
    space: Space | None
    tokens: TokenSet | None
    started: float
    reduced: list[str] = field(default_factory=list)
    not_counted: list[str] = field(default_factory=list)
    written: float = 0.0
    """Bytes a second that the writer took, flushed and compared."""
    loaded: float = 0.0
    """Bytes a second that were read and checked."""
    looks: float = 0.0
    """Seconds of all blocks in the look at held-out windows."""

    def timing(self, opening: float, output: int, state: int) -> Timing:
        """Measure all parts and add them up."""
        kinds = self._kinds()
        blocks = dict.fromkeys(("reading", "writing"), 0.0)
        for done, (index, count) in enumerate(kinds):
            until = time.monotonic() + (self.started + CAP - time.monotonic()) / (len(kinds) - done)
            found = self._block(index, until)
            for part, seconds in found.items():
                blocks[part] = blocks.get(part, 0.0) + count * seconds
            if self.plan.request.check_windows:
                clock = Clock(self.plan.request.device)
                self.looks += count * seconds_of_passes(self.plan, index, self.tokens, clock)
        n_blocks = self.plan.shape.n_blocks
        blocks["writing"] += n_blocks * state / self.written
        per_block = sum(blocks.values()) / n_blocks
        parts = {"opening": opening} | blocks
        parts["reading"] += self._outside(output)
        self._planning(parts)
        if self.plan.request.check_windows:
            clock = Clock(self.plan.request.device)
            parts[LOOK] = self.looks + seconds_of_logits(self.plan, self.tokens, clock)
        seconds = sum(parts.values())
        spread = _SPREAD_REDUCED if self.reduced else _SPREAD_WHOLE
        return Timing(
            seconds=seconds,
            seconds_per_block=per_block,
            seconds_low=seconds / spread,
            seconds_high=seconds * spread,
            seconds_by_part=parts,
            trial_seconds=time.monotonic() - self.started,
            reduced=list(dict.fromkeys(self.reduced)),
            not_counted=self.not_counted,
        )

    def _kinds(self) -> list[tuple[int, int]]:
        """(index of the first, number) of the blocks of every kind."""
        found: dict[Hashable, list[int]] = {}
        for index in range(self.plan.shape.n_blocks):
            found.setdefault(tuple(self.plan.skeleton.linear_shapes(index).items()), []).append(
                index
            )
        return [(indices[0], len(indices)) for indices in found.values()]

    def _block(self, index: int, until: float) -> dict[str, float]:
        """Seconds of one block by part. until: when it should be done, on time.monotonic()."""
        clock = Clock(self.plan.request.device)
        fits, text = Fits(clock, until), self._text()
        timed = TimedRun.of(self.plan, clock, fits)
        parts = (
            self._without_text(timed, index)
            if text is None
            else self._with_text(timed, index, text)
        )
        if fits.pieces:
            self.reduced.append("pieces of linears")
        return parts | fits.seconds()

    def _without_text(self, timed: TimedRun, index: int) -> dict[str, float]:
        parts = self._once(timed, index, None)
        return self._once(timed, index, None) if sum(parts.values()) < _WARM else parts

    def _with_text(self, timed: TimedRun, index: int, text: Text) -> dict[str, float]:
        """Two runs with different amounts of text, drawn out to all of it; fits
        are measured in the first."""
        fits = timed.fits
        until = fits.until
        first = text.portion(self._first_tokens(timed, index, text, until))
        timed = TimedRun.of(self.plan, timed.clock, fits, first.numel())
        fits.tokens_missing = text.tokens.numel() / first.numel()
        parts = self._once(timed, index, first)
        fits.done = True
        if sum(parts.values()) < _WARM:
            parts = self._once(timed, index, first)
        runs = [(first, parts)]
        if first.numel() < text.tokens.numel():
            affordable = (until - time.monotonic()) / max(sum(parts.values()), 1e-6)
            # Where more would take too long, less tells the line as well.
            times = min(affordable, 8.0) if affordable > 2 else 0.5
            second = text.portion(int(first.numel() * times))
            runs.append((second, self._once(timed, index, second)))
            runs.sort(key=lambda one: one[0].numel())
        longest = runs[-1][0].shape[1]
        wanted = text.tokens.shape[1]
        if longest < wanted:
            self.reduced.append(f"windows of {longest} tokens instead of {wanted}")
        out = {}
        for part in parts:
            reads, quadratic = timed.reads.get(part, (None, False))
            points = [
                (text.amount(windows, reads, quadratic), found[part]) for windows, found in runs
            ]
            out[part] = on_the_line(points, text.amount(text.tokens, reads, quadratic))
        return out

    def _text(self) -> Text | None:
        """The text, where the blocks read any."""
        needed = any(stage.needs_inputs for stage in self.plan.recipe.stages)
        return Text(self.tokens.tokens) if needed and self.tokens is not None else None

    def _first_tokens(self, timed: TimedRun, index: int, text: Text, until: float) -> int:
        """Tokens of a first run, of which all passes should take a tenth of the
        time: searches come on top."""
        hidden = timed.hidden(text.portion(_PROBED))
        block = timed.open(index, hidden)
        seconds = []
        with torch.no_grad():
            for _ in range(2):  # the first makes masks and rotary tables
                started = timed.clock.now()
                block.forward(block.module, hidden[0])
                seconds.append(timed.clock.now() - started)
        streams = 2 if timed.needs_parent else 1
        # roughly: it decides the amount of text alone
        passes = 5 * streams * (1 + len(timed.plan.recipe.stages))
        affordable = (until - time.monotonic()) / 10 / (passes * min(seconds))
        return int(max(_PROBED, affordable * hidden[0].shape[0] * hidden[0].shape[1], 1))

    def _once(self, timed: TimedRun, index: int, windows: Tensor | None) -> dict[str, float]:
        """Convert and write one block with some windows [B, T]; seconds by part,
        fits of weights left out."""
        clock = timed.clock
        clock.parts = {}
        streams = None if windows is None else timed.streams(windows)
        spent = timed.fits.spent
        started = clock.now()
        tensors = timed.block(index, streams)
        whole = clock.now() - started - (timed.fits.spent - spent)
        clock.parts[AROUND] = max(0.0, whole - sum(clock.parts.values()))
        encoding = self.plan.format.encoding(1)
        target = self.plan.request.output
        with CheckpointWriter(target, encoding) as writer, clock.lap("writing"):
            writer.add(tensors)
        self.written = max(self.written, writer.total_size / clock.parts["writing"])
        self.loaded = max(self.loaded, timed.state.source_bytes / clock.parts["reading"])
        timed.state.source_bytes = 0
        return dict(clock.parts)

    def _outside(self, output: int) -> float:
        """Seconds of what is read and hashed beside the blocks."""
        source = self.plan.source
        read = sum((source.folder / shard).stat().st_size for shard in source.shards)
        started = time.monotonic()
        hashlib.sha256(bytes(_HASHED)).digest()
        hashed = _HASHED / (time.monotonic() - started)
        # The source is hashed, then all of it is checked; the output is hashed
        # once more before it appears.
        matrices = (f"{name}.weight" for name in (self.plan.arch.embedding, self.plan.arch.head))
        outside = sum(part_sizes(self.plan)) + 2 * sum(
            int(torch.Size(source.shapes.get(name, (0,))).numel()) for name in matrices
        )
        return (read + output) / hashed + read / self.loaded + outside / self.written

    def _planning(self, parts: dict[str, float]) -> None:
        """Add what comes before the first block, or name it."""
        recipe = self.plan.recipe
        if recipe.head_bits is not None:
            self.not_counted.append(f"encoding {self.plan.arch.head}")
        for stage in recipe.stages:
            if stage.needs_plan:
                self.not_counted.append(f"what {stage.method} settles before the first block")
        if self.space is None or self.tokens is None:
            return
        left = self.started + CAP - time.monotonic()
        mean = sum(N * K for N, K in self.space.shapes.values()) / self.plan.shape.n_blocks
        if mean > _PLANNED_WEIGHTS or left < CAP / 4:
            self.not_counted.append(
                "measuring what rounding costs, for the target of bits per weight"
            )
            return
        text, points = Text(self.tokens.tokens), []
        for windows in (self.tokens.tokens[:1], self.tokens.tokens[:2]):
            started = time.monotonic()
            opener = partial(open_block, self.plan)
            self.space.measure(opener, 1, list(embed_windows(self.plan, windows)))
            points.append((text.amount(windows, SAMPLE_TOKENS, False), time.monotonic() - started))
        seconds = on_the_line(points, text.amount(text.tokens, SAMPLE_TOKENS, False))
        parts["bits by linear"] = self.plan.shape.n_blocks * seconds


@dataclass(frozen=True)
class Text:
    """Calibration windows [B, T], and portions of them."""

    tokens: Tensor

    def portion(self, tokens: int) -> Tensor:
        """About so many tokens: whole windows, or the beginning of one."""
        T = self.tokens.shape[1]
        return self.tokens[: tokens // T] if tokens >= T else self.tokens[:1, : max(1, tokens)]

    def amount(self, windows: Tensor, reads: int | None, quadratic: bool) -> float:
        """What the time of a part grows with, where it has these windows.

        reads: tokens that it reads at most; 0 for a part that reads none and always takes the same.
        quadratic: every token meets all of its window.
        """
        B, T = windows.shape
        if reads == 0:
            return 1.0
        read = B * T if reads is None else min(B * T, max(1, reads // T) * T)
        return float(read * T if quadratic else read)


def on_the_line(points: Sequence[tuple[float, float]], x: float) -> float:
    """Seconds at x by one or two measured points (x, seconds) in the order of x,
    which never fall as x grows."""
    (first, low), (second, high) = points[0], points[-1]
    if second <= first:
        return high * (x / first if first else 1.0)
    slope = min(max(0.0, (high - low) / (second - first)), high / second)
    return high + slope * (x - second)
