"""Seconds that fits of weights take in a trial, measured on whole linears where the time
allows that, else on pieces.

From pieces N rows of K inputs follow as a·K + A·K³ + N·(b·K + B·K²): loops over columns and the factorization of
a Hessian, then work on every weight and products with the Hessian. Two sizes of K tell loops from products: taken
for products, the loops of pieces of 512 inputs made hours of minutes. Without moments of inputs all grows with K.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from quantize.block.block import Block
from quantize.block.moments import Moments
from quantize.methods.encode import Encode
from quantize.model.linear import PackedLinear

_ROWS = 128
"""Rows of the smallest piece: far fewer would measure the solvers' loops over
columns and not their products."""
_GROUPS = 4
"""Groups of inputs in the smallest piece: the loop over groups is taken more than once, and the
Hessian stays small."""
_SHARE = 0.35
"""Of the time that is left, what one group of linears may take: three fit, and
text still gets its share."""


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


@dataclass(frozen=True)
class Fit:
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

    def piece(self, rows: int, inputs: int) -> Fit:
        """The same for the first rows and inputs of the first linear, which stays as it is."""
        name, moments = self.names[0], self.moments
        weight = self.block.linear(name).weight[:rows, :inputs].clone()
        linear = nn.Linear(inputs, len(weight), bias=False, device="meta").requires_grad_(False)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        block = replace(
            self.block,
            module=_alone(name, linear),
            packed={},
            histograms={},
            report={},
            frozen=None,
            parking=None,
        )
        if moments is not None:
            cross, wanted = moments.cross, moments.wanted
            moments = replace(
                moments,
                hessian=moments.hessian[:inputs, :inputs].clone(),
                absmean=moments.absmean[:inputs].clone(),
                cross=None if cross is None else cross[:inputs, :inputs].clone(),
                wanted=None if wanted is None else wanted[:rows, :inputs].clone(),
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


@dataclass(frozen=True)
class Growth:
    """Seconds that grow with the number of inputs, and with a power of it."""

    linear: float
    power: float
    exponent: int

    @classmethod
    def through(cls, points: Mapping[int, float], exponent: int) -> Growth:
        """That through what was measured, inputs → seconds, at one or two numbers of inputs; neither part falls."""
        small, large = min(points), max(points)
        seconds = points[large]
        if exponent == 1:
            return cls(seconds / large, 0.0, 1)
        if small == large:
            return cls(0.0, seconds / large**exponent, exponent)
        beyond = seconds - points[small] * large / small
        power = max(0.0, beyond) / (large**exponent - small**exponent * large / small)
        power = min(power, seconds / large**exponent)
        return cls(seconds / large - power * large ** (exponent - 1), power, exponent)

    def at(self, inputs: int) -> float:
        """Seconds at so many inputs."""
        return self.linear * inputs + self.power * float(inputs) ** self.exponent


@dataclass(frozen=True)
class Law:
    """How the seconds of a fit grow with its matrix."""

    alone: Growth
    """Whatever the rows."""
    each: Growth
    """Of a row."""

    def seconds(self, rows: int, inputs: int) -> float:
        """Seconds of a matrix [rows, inputs]."""
        return self.alone.at(inputs) + rows * self.each.at(inputs)


@dataclass
class Fits:
    """Seconds of the fits of one block's weights. What was fitted in whole is put in
    again when text is added."""

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
    _laws: dict[str, Law] = field(default_factory=dict)

    def seconds(self) -> dict[str, float]:
        """Seconds of all fits of the block by part."""
        out: dict[str, float] = {}
        for part, key in self._groups.values():
            out[f"{part}: fits"] = out.get(f"{part}: fits", 0.0) + self._known[key]
        return out

    def take(self, fit: Fit, part: str) -> None:
        """Measure a fit, or put in what came of it. Of experts, which
        are alike, one is measured."""
        started = self.clock.now()
        if not self.done:
            key = (part, fit.shapes)
            self._groups[fit.names] = part, key
            repeated = fit.block.arch.is_routed(fit.names[0]) or time.monotonic() > self.until
            if not (repeated and key in self._known):
                self._known[key] = self._measure(fit, part)
        elif all(name in self._encoded for name in fit.names):
            for name in fit.names:
                before = self._encoded[name]
                fit.block.encode(name, before.packed, before.fp8_activations)
        self.spent += self.clock.now() - started

    def _measure(self, fit: Fit, part: str) -> float:
        if fit.moments is not None:
            # Else experts that see few tokens of little text would be rounded and not fitted.
            fit.moments.tokens = int(fit.moments.tokens * self.tokens_missing)
        rows = sum(N for N, _ in fit.shapes)
        K = fit.shapes[0][1]
        by_inputs = (1, 1) if fit.moments is None else (3, 2)
        allowed = _SHARE * (self.until - time.monotonic())
        if allowed <= 0 and part in self._laws:
            return self._laws[part].seconds(rows, K)
        few = min(_ROWS, fit.shapes[0][0])
        group = getattr(fit.stage, "group_size", K)
        group = min(K, group) if group > 0 else K  # −1: the whole row
        inputs = min(K, _GROUPS * group)
        seconds = {inputs: self._clock(fit.piece(few, inputs))}
        while True:
            if seconds[inputs] * rows / few * (K / inputs) ** by_inputs[0] <= allowed:
                return self._whole(fit)
            if inputs == K or 2 ** by_inputs[0] * seconds[inputs] > allowed:
                break
            inputs = K if 2 * inputs > K else 2 * inputs
            seconds[inputs] = self._clock(fit.piece(few, inputs))
        more = min(
            fit.shapes[0][0], int(few * min(8.0, max(2.0, allowed / max(seconds[inputs], 1e-9))))
        )
        half = max(group, inputs // 2 // group * group)
        alone, each = {}, {}
        for size in {half, inputs}:
            once = seconds.get(size) or self._clock(fit.piece(few, size))
            longer = self._clock(fit.piece(more, size)) if more > few else once
            each[size] = min(max(0.0, (longer - once) / max(1, more - few)), longer / more)
            alone[size] = longer - each[size] * more
        law = self._laws[part] = Law(
            Growth.through(alone, by_inputs[0]), Growth.through(each, by_inputs[1])
        )
        self.pieces = True
        return law.seconds(rows, K)

    def _whole(self, fit: Fit) -> float:
        seconds = self._clock(fit)
        for name in fit.names:
            encoded = fit.block.module.get_submodule(name)
            assert isinstance(encoded, PackedLinear)
            self._encoded[name] = encoded
        return seconds

    def _clock(self, fit: Fit) -> float:
        started = self.clock.now()
        fit.run()
        return self.clock.now() - started
