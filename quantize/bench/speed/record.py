"""What a benchmark found: rows of figures, ceilings of the machine, and targets."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantize.bench.speed.targets import Target, targets
from quantize.errors import OutputError


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
    """Operations a second of a large square product, by precision: that of activations, and fp8 where torch has it."""


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
                name: self.tokens / spread.seconds for name, spread in {"pq": self.time, **self.peers}.items()
            }
        return facts


@dataclass
class Record:
    """All that was timed, and where."""

    device: str
    threads: int
    versions: dict[str, str]
    rounds: int
    ceilings: Ceilings
    notes: list[str]
    """What was left out, and why."""
    sections: dict[str, list[Row]] = field(default_factory=dict)

    def targets(self) -> list[Target]:
        """What the rows so far should reach."""
        return targets(self.sections)

    def as_json(self) -> dict[str, Any]:
        """Everything, targets included."""
        return {
            "device": self.device,
            "threads": self.threads,
            "versions": self.versions,
            "rounds": self.rounds,
            "ceilings": dataclasses.asdict(self.ceilings),
            "sections": {name: [row.as_json() for row in rows] for name, rows in self.sections.items()},
            "targets": [dataclasses.asdict(target) for target in self.targets()],
            "notes": self.notes,
        }

    def write(self, path: Path) -> None:
        """Write `as_json`; OutputError where that cannot be."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.as_json(), indent=1) + "\n")
        except OSError as err:
            raise OutputError(f"{path}: cannot be written ({err.strerror}); choose another file") from None
