"""How fast a conversion goes, what is left of it and what memory it
takes, told after every block."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from quantize.conversion.request import Request
from quantize.cost.peak import peak_of
from quantize.cost.units import duration, gigabytes

log = logging.getLogger(__name__)

SLOW = 5.0
"""Seconds that lie at least between two lines for those who see no progress bar: a line a block where
those take longer."""


class Pace:
    """Counts the blocks of one run, and tells from those done how long the others will take.

    Blocks of as many weights take alike; where none was seen yet (experts behind dense blocks),
    time is taken to grow with the weights.
    """

    def __init__(self, request: Request, done: int, weights: Sequence[int]) -> None:
        """weights: of the linears of every block."""
        self.request = request
        self.done = done
        self.blocks = len(weights)
        self._weights = weights
        self._first = done
        self._started = time.monotonic()
        self._last = 0.0
        self._took: dict[int, list[float]] = {}

    @property
    def per_block(self) -> float:
        """Seconds that a block took, in the mean of this run; 0 before the first."""
        return self._last / max(1, self.done - self._first)

    @property
    def left(self) -> float:
        """Seconds that the blocks still to come will take; 0 before the first is done."""
        if not self._took:
            return 0.0
        seen = sum(weights * len(took) for weights, took in self._took.items())
        each_weight = self._last / seen
        means = {weights: sum(took) / len(took) for weights, took in self._took.items()}
        return sum(
            means.get(weights, weights * each_weight) for weights in self._weights[self.done :]
        )

    def finish(self) -> None:
        """Tell about one more block."""
        now = time.monotonic() - self._started
        took = now - self._last
        self._last = now
        self.done += 1
        self._took.setdefault(self._weights[self.done - 1], []).append(took)
        left = self.left
        peak = peak_of(self.request.device)
        memory = f", peak memory {gigabytes(peak)}" if peak else ""
        projected = duration(now + left)
        place = f"block {self.done} of {self.blocks}"
        told = f"{place}: {duration(took)}, {duration(left)} left of {projected}{memory}"
        log.info("%s", told)
        self.request.require_room()
