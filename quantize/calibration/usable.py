"""The rows of a table that hold text, and what is said of the others."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from quantize.calibration.chats import UnusableRowError
from quantize.calibration.layouts import KNOWN, Row
from quantize.calibration.local_files import Table
from quantize.calibration.notes import Notes, OddRows
from quantize.errors import DataError


@dataclass(frozen=True)
class Rows:
    """Rows that hold text, and where each stands in its set."""

    rows: list[Row]
    numbers: list[int]
    unit: str
    """What `numbers` counts: line or row."""
    name: str
    """Columns that they were read from."""
    left_out: int
    notes: Notes


def usable_rows(table: Table, where: str, source: str, field: str | None) -> Rows:
    """Read every row of a table.

    where: the table, for errors. source: the same in short. field: the column that was asked for.
    DataError where the columns are not there, and where too many rows, or all, hold no text.
    """
    layout = table.layout
    names = ", ".join(table.names) or "none"
    if layout is None:
        first = f"{where} {table.unit} {table.numbers[0] if table.numbers else 1}"
        raise DataError(
            f"{first} has no field 'text' with text and none of a chat (pq knows {KNOWN}); "
            f"choose a text field among: {names}"
        )
    if field is not None and field not in table.names:
        raise DataError(f"{where} has no field {field!r}; choose a text field among: {names}")
    if not table.rows:
        raise DataError(f"{where} has no rows; give a file with text")
    rows: list[Row] = []
    numbers: list[int] = []
    odd, null = OddRows(where, table.unit, "hold no text"), 0
    for number, given in zip(table.numbers, table.rows, strict=True):
        try:
            row = layout.read(given)
        except UnusableRowError as error:
            odd.add(number, f"{layout.name}: {error}")
            continue
        if row is None:
            null += 1
            continue
        rows.append(row)
        numbers.append(number)
    odd.require_few(len(table.rows))
    if not rows:
        raise DataError(
            f"{where}: every one of its {len(table.rows)} rows is null or empty in {layout.name}; "
            f"choose a text field among: {names}"
        )
    notes = odd.notes(len(table.rows))
    if null:
        line = f"{source}: {null} of {len(table.rows)} rows are null in {layout.name}; left out"
        notes += ((logging.INFO, line),)
    return Rows(rows, numbers, table.unit, layout.name, len(odd) + null, notes)
