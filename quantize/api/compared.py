"""What a comparison found, as `quantize.compare` returns it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantize.api import html
from quantize.errors import PqError, UsageError
from quantize.pictures import Table
from quantize.report.comparison import Parent, Row, comparison, table
from quantize.report.exports import EXPORTS
from quantize.report.html import write_page
from quantize.version import __version__


@dataclass(frozen=True)
class Comparison:
    """Several models of one parent, measured on the same windows."""

    parent: Parent
    rows: tuple[Row, ...]
    errors: Mapping[str, PqError] = field(default_factory=dict)
    """Recipes that could not be carried out, and why."""
    notes: tuple[str, ...] = ()
    """What else is to be known of the figures, a line each."""

    @property
    def table(self) -> Table:
        """All figures, the parent's first."""
        return table(self.rows, self.parent)

    def export(self, form: str) -> str:
        """The table as `markdown`, `csv` or `latex`; UsageError for another."""
        if form not in EXPORTS:
            raise UsageError(f"--format {form}: choose table, {', '.join(EXPORTS)}")
        return EXPORTS[form](self.table)

    def write(self, page: str | Path) -> Path:
        """Write a page with table and picture, and its data as JSON beside it; UsageError unless
        its name ends in .html, OutputError."""
        lines = [f"{name}: not converted: {err}" for name, err in self.errors.items()]
        report = comparison(self.rows, self.parent, __version__, [*self.notes, *lines])
        return write_page(report, Path(page))

    def as_json(self) -> list[dict[str, Any]]:
        """Figures of each model, as `pq compare --json` prints them."""
        return [
            dataclasses.asdict(row.figures)
            | {
                "model": row.name,
                "bits_per_weight": row.bits,
                "bytes": row.bytes,
                "recipe": row.recipe,
                "tokens_per_second": row.tokens_per_second,
            }
            for row in self.rows
        ]

    def _repr_html_(self) -> str:
        found = self.table
        shown = ("model", "bits/weight", "MB", "MB/token", "perplexity", "KLD mean", "same top-1")
        kept = [i for i, name in enumerate(found.columns) if name in shown]
        lines = [[_cell(row[i], found.formats[i]) for i in kept] for row in found.rows]
        head = [found.columns[i] for i in kept]
        return html.table(f"Conversions of {self.parent.name}", lines, head)


def _cell(value: object, spec: str) -> str:
    return "–" if value is None else value if isinstance(value, str) else format(value, spec)
