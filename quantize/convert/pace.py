"""How fast a conversion goes, what is left of it and what memory it takes, told after every block."""

from __future__ import annotations

import logging
import time

from quantize.convert.request import Request
from quantize.cost.peak import peak_of
from quantize.cost.units import duration, gigabytes

log = logging.getLogger(__name__)

SLOW = 5.0
"""Seconds from which on a block is worth a line to those who see no progress bar."""


class Pace:
    """Counts the blocks of one run."""

    def __init__(self, request: Request, done: int, blocks: int) -> None:
        self.request, self.done, self.blocks = request, done, blocks
        self._first, self._started, self._last = done, time.monotonic(), 0.0

    @property
    def per_block(self) -> float:
        """Seconds that a block took, in the mean of this run; 0 before the first."""
        return self._last / max(1, self.done - self._first)

    def finished(self) -> None:
        """Tell about one more block."""
        now = time.monotonic() - self._started
        took, self._last, self.done = now - self._last, now, self.done + 1
        left, peak = self.per_block * (self.blocks - self.done), peak_of(self.request.device)
        memory = f", peak memory {gigabytes(peak)}" if peak else ""
        projected = duration(now + left)
        told = f"block {self.done} of {self.blocks}: {duration(took)}, {duration(left)} left of {projected}{memory}"
        log.info("%s", told, extra={"seconds": took})
        limit = self.request.max_vram if self.request.device.type == "cuda" else self.request.max_ram
        if peak and limit and peak > limit:
            log.warning("peak memory %s is above the limit of %s", gigabytes(peak), gigabytes(limit))
