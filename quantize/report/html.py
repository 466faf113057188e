"""A report as one HTML page without scripts, fonts, images or anything else from elsewhere."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from quantize.errors import UsageError
from quantize.files.writer import write_text
from quantize.pictures import Cell, Heatmap, Picture, Table
from quantize.report.collect import collect
from quantize.report.draw import Frame, y_range
from quantize.report.model import Group, Report, as_json, clean
from quantize.report.sources import beside
from quantize.report.svg import svg

_HERE = Path(__file__).resolve().parent
# Width and height of a picture in pixels: three beside each other, two, or one by itself.
_SMALL = (308, 210)
_HALF = (400, 225)
_ALONE = (440, 300)
PAIRED = (1, 2, 4)
"""Sizes of groups that stand in two columns; others stand in three."""
# Characters that would not show, or would reorder the text around them.
_INVISIBLE = re.compile("[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]")
_VISIBLE = {"\n": "↵", "\r": "␍", "\t": "⇥"}


def render(report: Report) -> str:
    """Return the page; equal reports give equal text."""
    env = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pictures = _Drawer()
    env.globals |= {"paired": PAIRED, "draw": pictures.one, "draw_group": pictures.group}
    env.filters |= {"cell": cell, "visible": visible, "percent": _percent, "numeric": numeric}
    # The style sheet is ours; everything else on the page is escaped.
    css = Markup((_HERE / "report.css").read_text(encoding="utf-8"))
    return clean(env.get_template("report.html.j2").render(report=report, css=css))


def write(folder: Path, output: Path | None = None) -> Path:
    """Write the page and, beside it, its data as JSON; returns the page's path.

    Without `output` these are DIR.report.html and DIR.report.json. Each file appears whole or not
    at all. Raises ModelError for a folder that pq did not write, UsageError for an `output` inside
    the checkpoint, OutputError.
    """
    return write_report(collect(folder), folder, output)


def write_report(report: Report, folder: Path, output: Path | None = None) -> Path:
    """`write` for a report that was collected already."""
    page = beside(folder, ".report.html") if output is None else output
    if page.resolve().is_relative_to(folder.resolve()):
        reason = "lies inside the checkpoint, which pq verify would refuse"
        raise UsageError(f"--output {page}: {reason}; give another")
    return write_page(report, page)


def write_page(report: Report, page: Path) -> Path:
    """Write a report to `page` and its data as JSON beside it; UsageError unless `page`
    ends in .html, OutputError."""
    if page.suffix not in (".html", ".htm"):
        raise UsageError(f"--output {page}: must end in .html; the JSON goes beside it")
    data = json.dumps(as_json(report), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(page.with_suffix(".json"), clean(data))
    write_text(page, render(report))
    return page


class _Drawer:
    """Draws pictures of one page; every picture gets ids of its own."""

    def __init__(self) -> None:
        self._drawn = 0

    def one(self, picture: Picture) -> Markup:
        return self._svg(picture, Frame(*_ALONE))

    def group(self, group: Group) -> Iterator[tuple[Picture, Markup]]:
        pictures = [p for p in group.pictures if not isinstance(p, Table)]
        few = len(pictures) in PAIRED
        width, height = _HALF if few else _SMALL
        # Two pictures are two quantities; more are the same quantity of several layers.
        charts = [picture for picture in pictures if not isinstance(picture, Heatmap)]
        shared = y_range(charts) if len(pictures) > 2 else None
        for picture in pictures:
            yield picture, self._svg(picture, Frame(width, height, shared))

    def _svg(self, picture: Picture, frame: Frame) -> Markup:
        self._drawn += 1
        return Markup(svg(picture, f"p{self._drawn}-", frame))


def cell(value: Cell, spec: str = "") -> str:
    """A cell of a table as text; four digits unless the column has a format."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, str):
        return value
    return format(value, spec) if spec else f"{value:.4g}"


def numeric(table: Table) -> list[bool]:
    """Which columns hold nothing but figures, a value with its error included."""
    return [_is_numeric([row[c] for row in table.rows]) for c in range(len(table.columns))]


def _is_numeric(column: list[Cell]) -> bool:
    known = [value for value in column if value is not None]
    return bool(known) and all(not isinstance(v, str) or " ± " in v for v in known)


def visible(text: str) -> str:
    """Text of tokens with line breaks shown and other invisible characters as their code point."""
    return _INVISIBLE.sub(lambda c: _VISIBLE.get(c[0], f"⟨{ord(c[0]):04X}⟩"), text)


def _percent(probability: float | None) -> str:
    if probability is None:
        return "–"
    share = 100 * probability
    return f"{share:.0f} %" if share >= 10 else f"{share:.2g} %" if share >= 0.01 else "< 0.01 %"
