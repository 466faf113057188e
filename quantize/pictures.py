"""Pictures as data: what a report shows, without a word on how it is drawn.

Plain Python values only, so that `dataclasses.asdict` of a picture is its JSON. None, like a number
that is not finite, means "not measured".
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Number = float | int | None
Cell = str | float | int | None


@dataclass(frozen=True)
class Heatmap:
    """A value for each pair of row and column; `values[r][c]` belongs to
    `rows[r]` and `columns[c]`."""

    title: str
    caption: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[Number]]
    unit: str = ""
    log: bool = False
    """Colours by the logarithm; values that have none count as not measured."""
    columns_label: str = ""
    kind: Literal["heatmap"] = field(default="heatmap", init=False)

    def __post_init__(self) -> None:
        _same("rows", len(self.rows), len(self.values))
        for row in self.values:
            _same("columns", len(self.columns), len(row))


@dataclass(frozen=True)
class Lines:
    """Curves over a common x; each of `series` has a value for every x."""

    title: str
    caption: str
    x: Sequence[float]
    series: Mapping[str, Sequence[Number]]
    x_label: str = ""
    y_label: str = ""
    log_x: bool = False
    log_y: bool = False
    kind: Literal["lines"] = field(default="lines", init=False)

    def __post_init__(self) -> None:
        for name, values in self.series.items():
            _same(f"series {name}", len(self.x), len(values))


@dataclass(frozen=True)
class Bars:
    """Bars for every category, side by side; each of `series` has a value for every category."""

    title: str
    caption: str
    categories: Sequence[str]
    series: Mapping[str, Sequence[Number]]
    y_label: str = ""
    log_y: bool = False
    stacked: bool = False
    """On top of each other: parts of a whole."""
    across: bool = False
    """From the left to the right, a row for each category, whose names may be long."""
    kind: Literal["bars"] = field(default="bars", init=False)

    def __post_init__(self) -> None:
        for name, values in self.series.items():
            _same(f"series {name}", len(self.categories), len(values))


@dataclass(frozen=True)
class Histogram:
    """Counts between edges, one more edge than counts; `points` are marked by vertical lines."""

    title: str
    caption: str
    edges: Sequence[float]
    counts: Sequence[Number]
    points: Sequence[float] = ()
    x_label: str = ""
    counted: str = "weights"
    log_x: bool = False
    """Edges, all of them positive, on a logarithmic axis."""
    kind: Literal["histogram"] = field(default="histogram", init=False)

    def __post_init__(self) -> None:
        _same("edges (one more than counts)", len(self.counts) + 1, len(self.edges))


@dataclass(frozen=True)
class Scatter:
    """Named points (label, x, y); `front` joins those that no other beats in both
    coordinates, less being better."""

    title: str
    caption: str
    points: Sequence[tuple[str, float, float]]
    x_label: str = ""
    y_label: str = ""
    front: bool = False
    log_y: bool = False
    """Points that have no logarithm are left out."""
    kind: Literal["scatter"] = field(default="scatter", init=False)


@dataclass(frozen=True)
class Table:
    """Rows of text and numbers; `formats` are format specs of the columns (`.3f`,
    `,d`), empty for four digits."""

    title: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    formats: Sequence[str] = ()
    kind: Literal["table"] = field(default="table", init=False)

    def __post_init__(self) -> None:
        for row in self.rows:
            _same("columns", len(self.columns), len(row))
        if self.formats:
            _same("formats", len(self.columns), len(self.formats))


Picture = Heatmap | Lines | Bars | Histogram | Scatter | Table


def _same(what: str, expected: int, found: int) -> None:
    if expected != found:
        raise ValueError(f"{what}: expected {expected}, found {found}")


def place_of(name: str) -> tuple[int, str] | None:
    """Split a full name into block and what follows:
    `model.layers.3.mlp.up_proj` → (3, "mlp.up_proj").

    None for a name outside the blocks.
    """
    parts = name.split(".")
    for i, part in enumerate(parts[1:-1], start=1):
        if part.isascii() and part.isdecimal() and len(part) < 10:
            return int(part), ".".join(parts[i + 1 :])
    return None


ANY = "*"
"""Stands for all numbers in a folded name."""


def fold_numbers(name: str) -> str:
    """A name within a block with its numbers left open: `mlp.experts.3.up_proj`
    → `mlp.experts.*.up_proj`."""
    return ".".join(
        ANY if part.isascii() and part.isdecimal() else part for part in name.split(".")
    )


def _mean(values: Sequence[float | int]) -> Number:
    return values[0] if len(values) == 1 else statistics.fmean(values) if values else None


def block_map(
    values: Mapping[str, Number], *, title: str, caption: str, unit: str = "", log: bool = False
) -> Heatmap | None:
    """Heat map of block (across) and name within the block (down) from full
    names; None when nothing is known.

    Rows stand in the order in which the names first appear. Names that differ by a number alone,
    such as those of experts, share a row and give their mean.
    """
    placed: dict[tuple[int, str], list[float | int]] = {}
    for name, value in values.items():
        if (place := place_of(name)) is not None:
            cell = placed.setdefault((place[0], fold_numbers(place[1])), [])
            cell += [] if value is None else [value]
    if not any(placed.values()):
        return None
    blocks = sorted({block for block, _ in placed})
    names = list(dict.fromkeys(name for _, name in placed))
    cells = [[_mean(placed.get((block, name), [])) for block in blocks] for name in names]
    if any(ANY in name for name in names):
        caption += f" A row with {ANY} is the mean over the numbers that stand there."
    return Heatmap(
        title, caption, names, [str(block) for block in blocks], cells, unit, log, "block"
    )


def facts(layers: Mapping[str, Mapping[str, Any]], fact: str) -> dict[str, Number]:
    """Return one numeric fact of every layer that has it, by full name."""
    return {name: value for name, found in layers.items() if _number(value := found.get(fact))}


def _number(value: Any) -> bool:
    # An integer beyond the range of floats is no measurement, and nothing can be computed with it.
    small = not isinstance(value, int) or abs(value) < 1 << 1000
    return isinstance(value, int | float) and not isinstance(value, bool) and small
