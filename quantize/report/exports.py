"""Tables as text that other programs take: Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Mapping

from quantize.pictures import Cell, Table

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "–": "--",
    **{special: f"\\{special}" for special in "&%$#_{}"},
}


def markdown(table: Table) -> str:
    """A table of GitHub's Markdown."""
    sides = ["---", *["---:"] * (len(table.columns) - 1)]
    lines = [[_cell(name) for name in table.columns], sides]
    lines += [[_cell(text) for text in row] for row in _shown(table)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(text: str) -> str:
    return re.sub(r"([\\|`*_<>])", r"\\\1", " ".join(text.split()))


def latex(table: Table) -> str:
    """A `tabular` with the rules of booktabs."""

    def line(cells: list[str]) -> str:
        return f"{' & '.join(map(_escaped, cells))} \\\\\n"

    sides = "l" + "r" * (len(table.columns) - 1)
    body = "".join(map(line, _shown(table)))
    return (
        f"\\begin{{tabular}}{{{sides}}}\n\\toprule\n{line(list(table.columns))}\\midrule\n"
        f"{body}\\bottomrule\n\\end{{tabular}}\n"
    )


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(c, c) for c in " ".join(text.split()))


def comma_separated(table: Table) -> str:
    """CSV with all digits; what was not measured is empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows([["" if value is None else value for value in row] for row in table.rows])
    return out.getvalue()


EXPORTS: Mapping[str, Callable[[Table], str]] = {
    "markdown": markdown,
    "csv": comma_separated,
    "latex": latex,
}
"""By the name that `--format` gives them."""


def _shown(table: Table) -> list[list[str]]:
    formats = table.formats or [""] * len(table.columns)
    return [
        [_text(value, spec) for value, spec in zip(row, formats, strict=True)] for row in table.rows
    ]


def _text(value: Cell, spec: str) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    return value if isinstance(value, str) else format(value, spec)
