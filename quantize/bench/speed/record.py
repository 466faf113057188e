"""What a benchmark found, as one file: rows of figures, ceilings of the machine, and targets."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantize.bench.speed.rows import Ceilings, Row
from quantize.bench.speed.targets import Target, targets
from quantize.errors import OutputError


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
            "sections": {
                name: [row.as_json() for row in rows] for name, rows in self.sections.items()
            },
            "targets": [dataclasses.asdict(target) for target in self.targets()],
            "notes": self.notes,
        }

    def write(self, path: Path) -> None:
        """Write `as_json`; OutputError where that cannot be."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.as_json(), indent=1) + "\n")
        except OSError as err:
            raise OutputError(
                f"{path}: cannot be written ({err.strerror}); choose another file"
            ) from None
