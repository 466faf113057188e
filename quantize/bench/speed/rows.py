"""Figures of a benchmark: pieces of work that were timed, and what the machine reaches at most."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Spread:
    """Seconds of one call over all rounds."""

    seconds: float
    """Median."""
    fastest: float
    slowest: float


@dataclass(frozen=True)
class Ceilings:
    """What the machine reached in the same run."""

    copy: float
    """Bytes that a copy of memory reads and writes in a second."""
    matmul: dict[str, float]
    """Operations a second of a large square product, by precision: that of activations, and fp8
    where torch has it."""


@dataclass(frozen=True)
class Row:
    """One piece of work at one size, ours and others'."""

    what: str
    shape: str
    M: int
    """Rows of activations, or sequences of a batch."""
    size: int
    """Weights of a linear, or tokens of a context."""
    time: Spread
    bytes: int
    """The fewest that must be moved."""
    flops: int
    precision: str
    """What is multiplied: a name of `Ceilings.matmul`."""
    bandwidth: float
    """Bytes a second as a part of the copy's."""
    compute: float | None
    """Operations a second as a part of the large product's; None where that was not measured."""
    peers: dict[str, Spread]
    tokens: int = 0
    """Tokens that a call makes."""

    @property
    def ratios(self) -> dict[str, float]:
        """How many times faster than each peer."""
        return {name: peer.seconds / self.time.seconds for name, peer in self.peers.items()}

    def as_json(self) -> dict[str, Any]:
        """All figures, the ratios among them, and tokens a second where tokens are made."""
        facts = dataclasses.asdict(self) | {"ratios": self.ratios}
        if self.tokens:
            facts["tokens_per_second"] = {
                name: self.tokens / spread.seconds
                for name, spread in {"pq": self.time, **self.peers}.items()
            }
        return facts
