"""Alike steps under way: when they end, also where the GPU's part of them slows down meanwhile."""

from __future__ import annotations

from math import sqrt

IDLE = float("inf")
"""When steps end of which none runs."""


class Steps:
    """Steps of one engine that were decided at once; only the length of its sequences differs."""

    # Looked up in every step; a dictionary of all the names of an engine is slower.
    __slots__ = ("_began", "_g", "_h", "_slope", "_t", "_x", "end", "factor", "mixed", "steps")

    def __init__(self) -> None:
        self.end = IDLE
        self.steps = 0
        self.mixed = False
        """Whether they hold prompts; then it is one step."""
        self.factor = 1.0
        """How many times longer the GPU's part takes, since others are on it."""
        self._began = 0.0
        self._g = self._slope = self._h = 0.0
        """Seconds of the first step's GPU part, what each one after takes longer, the host's part."""
        self._x = self._t = 0.0
        """Steps that were done at the time t."""

    @property
    def idle(self) -> bool:
        """Whether no step runs."""
        return self.end == IDLE

    def _time(self, x: float) -> float:
        """Seconds of the first `x` steps of those decided."""
        gpu = self._g * x + self._slope * x * (x - 1.0) * 0.5
        return self.factor * gpu + self._h * x

    def _progress(self, now: float) -> None:
        """Bring the steps done, as a fraction, up to `now`."""
        elapsed = now - self._t
        if elapsed > 0.0:
            y = (self._time(self._x) if self._x else 0.0) + elapsed
            a = self.factor * self._slope * 0.5
            b = self.factor * (self._g - self._slope * 0.5) + self._h
            x = (2.0 * y) / (b + sqrt(b * b + 4.0 * a * y)) if a > 0.0 else y / b
            self._x, self._t = min(x, float(self.steps)), now

    def share(self, now: float, factor: float) -> None:
        """Change how many times longer the GPU's part takes, since others began or ended."""
        if factor == self.factor:
            return
        if self.end != IDLE:
            self._progress(now)
            self.factor = factor
            self.end = now + self._time(self.steps) - self._time(self._x)
        self.factor = factor
