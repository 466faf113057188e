"""Time of a conversion, from a trial of its own steps on this machine: a block of every kind, with little text.

What reads text (forward passes, sums of products, searches) takes a + b·tokens: two amounts of text give the line.
What fits weights does not depend on the text. It is measured on whole linears where the time allows that; else on
pieces of them, from which N rows of K inputs follow as A·K³ + B·N·K²: the factorization of a Hessian, then work on
every row. The steps are those of a conversion, with clocks around them; nothing is known here about any method.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
import types
from collections.abc import Hashable, Iterator, MutableSequence, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantize.block.block import Block
from quantize.block.moments import Moments
from quantize.block.statistics import PROFILED_TOKENS
from quantize.block.streams import Streams
from quantize.calibration.tokens import TokenSet
from quantize.convert.allocation import SAMPLE_TOKENS, Space
from quantize.convert.conversion import Conversion
from quantize.files.writer import CheckpointWriter
from quantize.methods.base import Stage
from quantize.methods.encode import Encode
from quantize.model.linear import PackedLinear

CAP = 20.0
"""Seconds that a trial aims to stay below: what is told before a run of minutes or hours may take no longer.

A single step is not cut short, so that a trial of a huge model on a slow machine may take some more.
"""
_SPREAD_WHOLE, _SPREAD_REDUCED = 1.6, 2.5
"""Factors of the range told. Where all steps were run in full size, estimates of the reference model lay within 1.6 of
what conversions took on two busy cores; what follows from pieces has the error of the scaling laws on top."""
_ROWS = 128
"""Rows of the smallest piece: far fewer would measure the solvers' loops over columns and not their products."""
_GROUPS = 4
"""Groups of inputs in the smallest piece."""
_SHARE = 0.35
"""Of the time that is left, what one group of linears may take: three fit, and text still gets its share."""
_WARM = 1.0
"""Seconds below which a run is repeated, since the first one of a process takes longer."""
_PROBED = 64
"""Tokens of the pass by which the amount of text is chosen."""
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


class Clock:
    """Seconds by part of the work; waits for the device, which computes behind our back."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.parts: dict[str, float] = {}

    def now(self) -> float:
        """Seconds since any moment, all work so far done."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.monotonic()

    @contextmanager
    def lap(self, part: str) -> Iterator[None]:
        """Add what is done inside to a part."""
        started = self.now()
        yield
        self.parts[part] = self.parts.get(part, 0.0) + self.now() - started


def timing(
    run: Conversion, space: Space | None, tokens: TokenSet | None, opening: float, output: int, state: int
) -> Timing:
    """Measure what a conversion takes.

    run, space, tokens: as `quantize.convert.opening.opened` gives them, in `opening` seconds. output: bytes of its weights.
    state: bytes of hidden states that it keeps after every block. Leaves nothing on the disk.
    Raises what the conversion raises on the same blocks.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="pq-trial-") as folder:
        request = replace(run.request, output=Path(folder) / "out", work=None, resume=None)
        stages = tuple(
            stage.for_trial(0 if tokens is None else tokens.tokens.numel()) for stage in request.recipe.stages
        )
        request = replace(request, recipe=request.recipe.model_copy(update={"stages": stages}))
        run = Conversion(request, run.source, run.arch, run.shape, run.skeleton)
        if tokens is not None and run.needs_plan:
            run = run.planned(tokens, lambda what, done, total: None)
        return _Trial(run, space, tokens, started).timing(opening, output, state)


@dataclass
class _Trial:
    """One trial. All of it keeps within the conversion's own limits of memory, of which it needs less."""

    run: Conversion
    space: Space | None
    tokens: TokenSet | None
    started: float
    reduced: list[str] = field(default_factory=list)
    not_counted: list[str] = field(default_factory=list)
    written: float = 0.0
    """Bytes a second that the writer took, flushed and compared."""
    loaded: float = 0.0
    """Bytes a second that were read and checked."""

    def timing(self, opening: float, output: int, state: int) -> Timing:
        """Measure all parts and add them up."""
        kinds = self._kinds()
        blocks = dict.fromkeys(("reading", "writing"), 0.0)
        for done, (index, count) in enumerate(kinds):
            until = time.monotonic() + (self.started + CAP - time.monotonic()) / (len(kinds) - done)
            for part, seconds in self._block(index, until).items():
                blocks[part] = blocks.get(part, 0.0) + count * seconds
        n_blocks = self.run.shape.n_blocks
        blocks["writing"] += n_blocks * state / self.written
        per_block = sum(blocks.values()) / n_blocks
        parts = {"calibration text": opening} | blocks
        parts["reading"] += self._outside(output)
        self._planning(parts)
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
        for index in range(self.run.shape.n_blocks):
            found.setdefault(tuple(self.run.skeleton.linear_shapes(index).items()), []).append(index)
        return [(indices[0], len(indices)) for indices in found.values()]

    def _block(self, index: int, until: float) -> dict[str, float]:
        """Seconds of one block by part. until: when it should be done, on time.monotonic()."""
        clock = Clock(self.run.request.device)
        text = self._text()
        fits = _Fits(clock, until)
        timed = _TimedRun.of(self.run, clock, fits)
        if text is None:
            parts = self._once(timed, index, None)
            if sum(parts.values()) < _WARM:
                parts = self._once(timed, index, None)
            return parts | fits.seconds()
        first = text.portion(self._first_tokens(timed, index, text, until))
        timed = _TimedRun.of(self.run, clock, fits, first.numel())
        fits.tokens_missing = text.tokens.numel() / first.numel()
        parts = self._once(timed, index, first)
        fits.done = True
        linear = sum(parts.values())
        if linear < _WARM:
            parts = self._once(timed, index, first)
            linear = sum(parts.values())
        affordable = (until - time.monotonic()) / max(linear, 1e-6)
        second = text.portion(int(first.numel() * min(affordable, 8.0)))
        self._name_what_was_reduced(text, second if second.numel() > first.numel() else first, fits)
        more = self._once(timed, index, second) if second.numel() > first.numel() else parts
        out = {}
        for part in parts:
            reads, quadratic = timed.reads.get(part, (None, False))
            xs = [text.amount(some, reads, quadratic) for some in (first, second, text.tokens)]
            out[part] = _on_the_line(xs, parts[part], more.get(part, 0.0))
        return out | fits.seconds()

    def _text(self) -> _Text | None:
        """The text, where the blocks read any."""
        needed = any(stage.needs_inputs for stage in self.run.request.recipe.stages)
        return _Text(self.tokens.tokens) if needed and self.tokens is not None else None

    def _first_tokens(self, timed: _TimedRun, index: int, text: _Text, until: float) -> int:
        """Tokens of a first run, of which all passes should take a fifth of the time."""
        hidden = timed.hidden(text.portion(_PROBED))
        block = timed.open(index, hidden)
        seconds = []
        with torch.no_grad():
            for _ in range(2):  # the first makes masks and rotary tables
                started = timed.clock.now()
                block.forward(block.module, hidden[0])
                seconds.append(timed.clock.now() - started)
        streams = 2 if timed.needs_reference else 1
        passes = 5 * streams * (1 + len(timed.request.recipe.stages))  # roughly: it decides the amount of text alone
        affordable = (until - time.monotonic()) / 5 / (passes * min(seconds))
        return int(max(_PROBED, affordable * hidden[0].shape[0] * hidden[0].shape[1], 1))

    def _once(self, timed: _TimedRun, index: int, windows: Tensor | None) -> dict[str, float]:
        """Convert and write one block with some windows [B, T]; seconds by part, fits of weights left out."""
        clock = timed.clock
        clock.parts = {}
        streams = None if windows is None else timed.streams(windows)
        spent, started = timed.fits.spent, clock.now()
        tensors = timed.block(index, streams)
        whole = clock.now() - started - (timed.fits.spent - spent)
        clock.parts["around the stages"] = max(0.0, whole - sum(clock.parts.values()))
        with CheckpointWriter(timed.request.output, 1) as writer, clock.lap("writing"):
            writer.add_shard(tensors)
        self.written = max(self.written, writer.total_size / clock.parts["writing"])
        self.loaded = max(self.loaded, timed.source_bytes / clock.parts["reading"])
        timed.source_bytes = 0
        return dict(clock.parts)

    def _name_what_was_reduced(self, text: _Text, most: Tensor, fits: _Fits) -> None:
        """Note what a full-size step was not run of."""
        if most.shape[1] < text.tokens.shape[1]:
            self.reduced.append(f"windows of {most.shape[1]} tokens instead of {text.tokens.shape[1]}")
        if fits.pieces:
            self.reduced.append("pieces of linears")

    def _outside(self, output: int) -> float:
        """Seconds of what is read and hashed beside the blocks."""
        source = self.run.source
        read = sum((source.folder / shard).stat().st_size for shard in source.shards)
        started = time.monotonic()
        hashlib.sha256(bytes(_HASHED)).digest()
        hashed = _HASHED / (time.monotonic() - started)
        # The source is hashed, then all of it is checked; the output is hashed once more before it appears.
        embedding = [
            source.shapes.get(f"{name}.weight", (0,)) for name in (self.run.arch.embedding, self.run.arch.head)
        ]
        outside = 2 * sum(int(torch.Size(shape).numel()) for shape in embedding)
        return (read + output) / hashed + read / self.loaded + outside / self.written

    def _planning(self, parts: dict[str, float]) -> None:
        """Add what comes before the first block, or name it."""
        recipe = self.run.request.recipe
        if recipe.head_bits is not None:
            self.not_counted.append(f"encoding {self.run.arch.head}")
        for stage in recipe.stages:
            if stage.needs_plan:
                self.not_counted.append(f"what {stage.method} settles before the first block")
        if self.space is None or self.tokens is None:
            return
        window = self.tokens.tokens[:1]
        left = self.started + CAP - time.monotonic()
        mean = sum(N * K for N, K in self.space.shapes.values()) / self.run.shape.n_blocks
        if mean > _PLANNED_WEIGHTS or left < CAP / 4:
            self.not_counted.append("measuring what rounding costs, for the target of bits per weight")
            return
        seconds = []
        for windows in (window, self.tokens.tokens[:2]):
            started = time.monotonic()
            self.space.measure(self.run.open, 1, self.run.hidden(windows))
            seconds.append(time.monotonic() - started)
        text = _Text(self.tokens.tokens)
        xs = [text.amount(some, SAMPLE_TOKENS, False) for some in (window, self.tokens.tokens[:2], text.tokens)]
        parts["bits by linear"] = self.run.shape.n_blocks * _on_the_line(xs, *seconds)


_PLANNED_WEIGHTS = 1 << 22
"""Weights of a block up to which rounding every linear, twice, takes seconds."""


@dataclass(frozen=True)
class _Text:
    """Calibration windows [B, T], and portions of them."""

    tokens: Tensor

    def portion(self, tokens: int) -> Tensor:
        """About so many tokens: whole windows, or the beginning of one."""
        T = self.tokens.shape[1]
        return self.tokens[: tokens // T] if tokens >= T else self.tokens[:1, : max(1, tokens)]

    def amount(self, windows: Tensor, reads: int | None, quadratic: bool) -> float:
        """What the time of a part grows with, where it has these windows.

        reads: tokens that it reads at most. quadratic: every token meets all of its window.
        """
        B, T = windows.shape
        read = B * T if reads is None else min(B * T, max(1, reads // T) * T)
        return float(read * T if quadratic else read)


def _on_the_line(xs: Sequence[float], first: float, second: float) -> float:
    """The seconds at xs[2], where those at xs[0] and xs[1] were measured; both grow with x or not at all."""
    if xs[1] <= xs[0]:
        return max(first, second) * max(1.0, xs[2] / xs[0])
    slope = max(0.0, (second - first) / (xs[1] - xs[0]))
    constant = max(0.0, second - slope * xs[1])
    return constant + slope * xs[2]


class _TimedRun(Conversion):
    """A conversion with clocks around its parts."""

    clock: Clock
    fits: _Fits
    reads: dict[str, tuple[int | None, bool]]
    """Tokens that a part reads at most, and whether every one meets all of its window."""

    @classmethod
    def of(cls, run: Conversion, clock: Clock, fits: _Fits, tokens: int = 0) -> _TimedRun:
        """The same conversion, timed, with stages as a first run of so many tokens needs them."""
        named = {f"{place + 1}. {stage.method}": stage for place, stage in enumerate(run.request.recipe.stages)}
        stages = tuple(_timed(stage.for_trial(tokens), part, clock, fits) for part, stage in named.items())
        recipe = run.request.recipe.model_copy(update={"stages": stages})
        out = cls(replace(run.request, recipe=recipe), run.source, run.arch, run.shape, run.skeleton)
        out.clock, out.fits = clock, fits
        # The search for the cache's scales computes attention alone.
        out.reads = {part: (stage.tokens_read, stage.kind == "cache") for part, stage in named.items()}
        out.reads["profiles"] = (PROFILED_TOKENS, False)
        out.reads["reading"] = (0, False)
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


def _timed(stage: Stage, part: str, clock: Clock, fits: _Fits) -> Stage:
    """The same stage with a clock around `apply`, its fits of weights left to `fits`."""
    plain = type(stage)

    def apply(self: Stage, block: Block) -> None:
        spent = fits.spent
        with clock.lap(part):
            plain.apply(self, block)
        clock.parts[part] -= fits.spent - spent

    def encode_group(self: Encode, block: Block, names: Sequence[str], moments: Moments | None) -> None:
        fits.take(_Fit(self, plain, block, tuple(names), moments), part)

    body: dict[str, Any] = {"apply": apply}
    if isinstance(stage, Encode):
        body["encode_group"] = encode_group
    kind = types.new_class(plain.__name__, (plain,), {}, lambda namespace: namespace.update(body))
    timed: Stage = kind.model_construct(**{name: getattr(stage, name) for name in plain.model_fields})
    return timed


@dataclass(frozen=True)
class _Fit:
    """One call of `encode_group`: linears that share an input, in whole or a piece of the first."""

    stage: Encode
    method: type[Any]
    block: Block
    names: tuple[str, ...]
    moments: Moments | None

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """[N, K] of the linears."""
        weights = (self.block.linear(name).weight for name in self.names)
        return tuple((w.shape[0], w.shape[1]) for w in weights)

    def run(self) -> None:
        """Encode."""
        self.method.encode_group(self.stage, self.block, self.names, self.moments)

    def piece(self, rows: int, inputs: int) -> _Fit:
        """The same for the first rows and inputs of the first linear, which stays as it is."""
        name, moments = self.names[0], self.moments
        weight = self.block.linear(name).weight[:rows, :inputs].clone()
        linear = nn.Linear(inputs, len(weight), bias=False, device="meta").requires_grad_(False)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        block = replace(
            self.block, module=_alone(name, linear), packed={}, histograms={}, report={}, reference=None, parking=None
        )
        if moments is not None:
            cross, residual = moments.cross, moments.residual
            moments = replace(
                moments,
                hessian=moments.hessian[:inputs, :inputs].clone(),
                absmean=moments.absmean[:inputs].clone(),
                cross=None if cross is None else cross[:inputs, :inputs].clone(),
                residual=None if residual is None else residual[:rows, :inputs].clone(),
            )
        return replace(self, block=block, names=(name,), moments=moments)


def _alone(name: str, linear: nn.Linear) -> nn.Module:
    """A module in which the linear has this dotted name."""
    *parents, last = name.split(".")
    root = inner = nn.Module()
    for parent in parents:
        child = nn.Module()
        inner.add_module(parent, child)
        inner = child
    inner.add_module(last, linear)
    return root


@dataclass
class _Fits:
    """Seconds of the fits of one block's weights. What was fitted in whole is put in again when text is added."""

    clock: Clock
    until: float
    tokens_missing: float = 1.0
    """Tokens of the whole text over those of the first run."""
    done: bool = False
    """Whether all was measured."""
    pieces: bool = False
    """Whether anything was measured on pieces."""
    spent: float = 0.0
    """Seconds of the trial itself that went into fits so far."""
    _known: dict[Hashable, float] = field(default_factory=dict)
    _groups: dict[tuple[str, ...], tuple[str, Hashable]] = field(default_factory=dict)
    _encoded: dict[str, PackedLinear] = field(default_factory=dict)

    def seconds(self) -> dict[str, float]:
        """Seconds of all fits of the block by part."""
        out: dict[str, float] = {}
        for part, key in self._groups.values():
            out[f"{part}: fits"] = out.get(f"{part}: fits", 0.0) + self._known[key]
        return out

    def take(self, fit: _Fit, part: str) -> None:
        """Measure a fit, or put in what came of it; one of linears of the same shapes is not repeated."""
        started = self.clock.now()
        if not self.done:
            key = (part, fit.shapes)
            self._groups[fit.names] = part, key
            if key not in self._known:
                self._known[key] = self._measured(fit)
        elif all(name in self._encoded for name in fit.names):
            for name in fit.names:
                before = self._encoded[name]
                fit.block.encode(name, before.packed, before.fp8_activations)
        self.spent += self.clock.now() - started

    def _measured(self, fit: _Fit) -> float:
        if fit.moments is not None:
            # Else experts that see few tokens of little text would be rounded and not fitted.
            fit.moments.tokens = int(fit.moments.tokens * self.tokens_missing)
        rows, K = sum(N for N, _ in fit.shapes), fit.shapes[0][1]
        by_inputs = (1, 1) if fit.moments is None else (3, 2)
        allowed = _SHARE * (self.until - time.monotonic())
        few, inputs = min(_ROWS, fit.shapes[0][0]), min(K, _GROUPS * getattr(fit.stage, "group_size", K))
        seconds = self._clocked(fit.piece(few, inputs))
        while True:
            if seconds * rows / few * (K / inputs) ** by_inputs[0] <= allowed:
                return self._whole(fit)
            if inputs == K or 2 ** by_inputs[0] * seconds > allowed:
                break
            inputs = K if 2 * inputs > K else 2 * inputs
            seconds = self._clocked(fit.piece(few, inputs))
        self.pieces = True
        more = min(fit.shapes[0][0], int(few * min(8.0, max(2.0, allowed / seconds))))
        if more <= few:
            return seconds * rows / few * (K / inputs) ** by_inputs[0]
        each = max(0.0, (self._clocked(fit.piece(more, inputs)) - seconds) / (more - few))
        alone = max(0.0, seconds - each * few)
        return alone * (K / inputs) ** by_inputs[0] + each * rows * (K / inputs) ** by_inputs[1]

    def _whole(self, fit: _Fit) -> float:
        seconds = self._clocked(fit)
        for name in fit.names:
            encoded = fit.block.module.get_submodule(name)
            assert isinstance(encoded, PackedLinear)
            self._encoded[name] = encoded
        return seconds

    def _clocked(self, fit: _Fit) -> float:
        started = self.clock.now()
        fit.run()
        return self.clock.now() - started
