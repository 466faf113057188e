"""Results as small HTML tables, as notebooks show them."""

from __future__ import annotations

import html
from collections.abc import Sequence

_CELL = "padding:2px 10px;text-align:"


def table(caption: str, rows: Sequence[Sequence[str]], head: Sequence[str] = ()) -> str:
    """A table of text, every cell escaped: the first column to the left, the others to the right."""
    top = f"<thead>{_row(head, 'th')}</thead>" if head else ""
    body = "".join(_row(row, "td") for row in rows)
    return f"<table><caption>{_clean(caption)}</caption>{top}<tbody>{body}</tbody></table>"


def _row(cells: Sequence[str], tag: str) -> str:
    sides = ["left", *["right"] * (len(cells) - 1)]
    return "".join(
        [
            "<tr>",
            *(
                f'<{tag} style="{_CELL}{side}">{_clean(cell)}</{tag}>'
                for side, cell in zip(sides, cells, strict=True)
            ),
            "</tr>",
        ]
    )


def _clean(text: str) -> str:
    """Escaped; what is no Unicode, as a name of a file may be, as a question mark."""
    return html.escape(text.encode("utf-8", "replace").decode("utf-8"))


def figure(value: float | None, digits: int, stderr: float | None = None) -> str:
    """A figure with its standard error, or a dash."""
    if value is None:
        return "–"
    return f"{value:.{digits}f}" + ("" if stderr is None else f" ± {stderr:.{digits}f}")
