"""How a checkpoint came about, as its pq.json tells people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.errors import ModelError
from quantize.files.hub_origin import HubOrigin, origin_in
from quantize.files.provenance import read_provenance
from quantize.files.small import Dequantized
from quantize.formats.grouping import adapted_lines

_WORST = 5  # a terminal shows what follows them, too


@dataclass(frozen=True)
class Worst:
    """A linear with a large recorded error."""

    name: str
    error: float
    kind: str
    """output_error, or weight_error for data-free recipes."""


@dataclass(frozen=True)
class Origin:
    """What pq.json says about the conversion."""

    pq: str
    recipe: str
    recipe_resolved: str
    calibration: Mapping[str, Any] | None
    origin: HubOrigin | None
    """The source on the Hub; None for a local folder."""
    source: Mapping[str, str]
    dequantized: str | None
    """How the source was stored, where that was small and was dequantized."""
    versions: Mapping[str, str]
    machine: Mapping[str, str]
    dropped_sequences: int
    fallbacks: tuple[str, ...]
    adapted: tuple[str, ...]
    """What linears got instead of what the recipe asks for, because of their sizes."""
    worst: tuple[Worst, ...]


def read_origin(folder: Path) -> tuple[Origin | None, str | None]:
    """What pq.json of a checkpoint says, and why it cannot be used; None and
    None where there is none."""
    try:
        data = read_provenance(folder)
    except ModelError as err:
        return None, str(err)
    if data is None:
        return None, None
    small = Dequantized.read(data.get("dequantized"))
    origin = Origin(
        pq=data["pq"],
        recipe=data["recipe"]["name"],
        recipe_resolved=data["recipe"]["resolved"],
        calibration=data["calibration"],
        origin=origin_in(data),
        source=data["source"],
        dequantized=None if small is None else str(small),
        versions=data["versions"],
        machine=data["machine"],
        dropped_sequences=data["dropped_sequences"],
        fallbacks=tuple(name for name, facts in data["layers"].items() if facts.get("fallback")),
        adapted=tuple(adapted_lines(data["layers"])),
        worst=_worst(data["layers"]),
    )
    return origin, None


def _worst(layers: Mapping[str, Mapping[str, Any]]) -> tuple[Worst, ...]:
    found = []
    for name, facts in layers.items():
        kind = "output_error" if "output_error" in facts else "weight_error"
        error = facts.get(kind)
        if isinstance(error, int | float):
            found.append(Worst(name, float(error), kind))
    # NaN is the worst of all.
    return tuple(
        sorted(found, key=lambda w: math.inf if math.isnan(w.error) else w.error, reverse=True)[
            :_WORST
        ]
    )
