"""Where the bytes are: of every part of a model, as codes, scales, and what stays in 16 bits."""

from __future__ import annotations

from quantize.pictures import Bars, Cell, Table
from quantize.report.model import Item
from quantize.report.sources import CODES, SCALES, UNPACKED, Sources

_ROWS = 16
"""Parts that are drawn; the table has all of them."""


def bytes_by_part(sources: Sources) -> list[Item]:
    """A picture and a table of the bytes of all parts, the largest first; nothing where the
    checkpoint cannot be read."""
    if sources.weights is None:
        return []
    parts = sorted(sources.weights.parts.items(), key=lambda part: -sum(part[1].values()))
    total = sum(sum(sizes.values()) for _, sizes in parts)
    if not total:
        return []
    kinds = [k for k in (CODES, SCALES, UNPACKED) if any(k in sizes for _, sizes in parts)]
    drawn = parts[:_ROWS]
    series = {kind: [sizes.get(kind, 0) / 1e6 for _, sizes in drawn] for kind in kinds}
    more = f" The largest {_ROWS} of {len(parts)}." if len(parts) > _ROWS else ""
    caption = f"Of all blocks together, in the order of size.{more}"
    rows: list[list[Cell]] = []
    for name, sizes in parts:
        whole = sum(sizes.values())
        row: list[Cell] = [name, whole / 1e6, 100 * whole / total]
        rows.append([*row, *(sizes[kind] / 1e6 if kind in sizes else None for kind in kinds)])
    columns = ("part", "MB", "% of all", *(f"{kind}, MB" for kind in kinds))
    formats = ("", ",.2f", ".1f", *(",.2f" for _ in kinds))
    names = [name for name, _ in drawn]
    return [
        Bars("Where the bytes are", caption, names, series, "MB", stacked=True, across=True),
        Table("Bytes by part", f"{total / 1e6:,.2f} MB of tensors.", columns, rows, formats),
    ]
