"""Heat maps: every cell a rectangle with its value as a tooltip, colours in
steps that the page defines."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from quantize.pictures import Heatmap
from quantize.report.draw import INK, finite, format_number, positive
from quantize.report.model import clean

STEPS = 11  # odd, so that a scale has a middle
HEAT = tuple(f"#0002{i:02x}" for i in range(STEPS))
HEAT_TEXT = tuple(f"#0003{i:02x}" for i in range(STEPS))
MISSING = "#000004"
TOOLTIP = "cell-"
"""Prefix of the ids of cells; the rest is the index of the tooltip."""

_SIZE = 11  # of text, in pixels
_MIDDLE = 4  # the colour of a map that has one value
_FEW = 6  # distinct values that are named one by one instead of by a scale
_NAMED = 16  # columns up to which values are written into the cells
_LABELS = 6.6  # pixels of a character of a row's label
_TOOLTIPS = 4000  # each is an element of the page; browsers grow slow with more
_KEY = 72  # pixels below the grid


@dataclass(frozen=True)
class _Scale:
    """Which of the STEPS colours a value has."""

    values: tuple[float, ...]
    log: bool

    @property
    def is_short(self) -> bool:
        """Whether its values are few enough to be named one by one."""
        return len(self.values) <= _FEW

    def step(self, value: float) -> int:
        if self.is_short:
            # Few values are spread over the colours by rank: 3, 4 and 16 bits stand apart.
            last = len(self.values) - 1
            return self.values.index(value) * (STEPS - 1) // last if last > 0 else _MIDDLE
        low, high, at = (self._at(v) for v in (self.values[0], self.values[-1], value))
        return min(STEPS - 1, int((at - low) / (high - low) * STEPS))

    def edge(self, step: float) -> float:
        """Value at a place of the scale, 0 … STEPS."""
        low, high = self._at(self.values[0]), self._at(self.values[-1])
        at = low + (high - low) * step / STEPS
        return float(2.0**at) if self.log else at

    def _at(self, value: float) -> float:
        return math.log2(value) if self.log else value


def heatmap(picture: Heatmap) -> tuple[Figure, list[str]]:
    """Draw a heat map; returns it with the tooltips of its cells, which `TOOLTIP` ids number."""
    keep: Callable[[float | int | None], float] = positive if picture.log else finite
    cells = [[keep(value) for value in row] for row in picture.values]
    scale = _Scale(
        tuple(sorted({v for row in cells for v in row if not math.isnan(v)})),
        picture.log,
    )
    rows, columns = len(picture.rows), len(picture.columns)
    cell = min(66.0, max(10.0, 800 / max(1, columns)))
    labels = ("0000", picture.columns_label, *map(_short, picture.rows))
    left = 16 + _LABELS * max(len(label) for label in labels)
    grid_width = max(columns * cell, 300.0)
    height = 26.0 if rows <= 24 else 14.0  # many rows are drawn flat, to fit on a page
    cell = grid_width / max(1, columns)
    width = left + grid_width + 12
    total = 30 + rows * height + _KEY
    fig = Figure(figsize=(width / 72, total / 72), dpi=72)
    ax = fig.add_axes((left / width, _KEY / total, grid_width / width, rows * height / total))
    _bare(ax, (0, max(1, columns)), (max(1, rows), 0))
    tooltips = _cells(ax, picture, cells, scale)
    _labels(ax, picture, cell, height)
    key = fig.add_axes((left / width, 24 / total, min(grid_width, 460) / width, 12 / total))
    _key(key, scale, picture.unit)
    return fig, tooltips


def _bare(ax: Axes, x: tuple[float, float], y: tuple[float, float]) -> None:
    ax.set_xlim(x)
    ax.set_ylim(y)
    ax.tick_params(length=0, labelsize=_SIZE, labelcolor=INK, pad=5)
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)


def _cells(
    ax: Axes,
    picture: Heatmap,
    cells: Sequence[Sequence[float]],
    scale: _Scale,
) -> list[str]:
    tooltips: list[str] = []
    named = len(picture.columns) <= _NAMED
    # Two digits tell values apart unless they are all much the same.
    alike = len(scale.values) > 1 and 0 < scale.values[-1] < 2 * scale.values[0]
    for r, row in enumerate(cells):
        for c, value in enumerate(row):
            known = not math.isnan(value)
            step = scale.step(value) if known else 0
            box = Rectangle(
                (c + 0.02, r + 0.03),
                0.96,
                0.94,
                facecolor=HEAT[step] if known else MISSING,
                clip_on=False,
            )
            if len(tooltips) < _TOOLTIPS:
                box.set_gid(f"{TOOLTIP}{len(tooltips)}")
                what = f"{format_number(value)} {picture.unit}".strip() if known else "not measured"
                column = f"{picture.columns_label} {picture.columns[c]}"
                tooltips.append(f"{column}, {picture.rows[r]}: {what}".strip())
            ax.add_patch(box)
            if named:
                colour = HEAT_TEXT[step] if known else INK
                label = format_number(value, 3 if alike else 2) if known else "–"
                ax.text(
                    c + 0.5,
                    r + 0.5,
                    label,
                    ha="center",
                    va="center_baseline",
                    fontsize=_SIZE,
                    color=colour,
                )
    return tooltips


def _labels(ax: Axes, picture: Heatmap, cell: float, height: float) -> None:
    every = max(1, math.ceil(13 / height))
    rows = range(0, len(picture.rows), every)
    ax.set_yticks([r + 0.5 for r in rows], [_short(picture.rows[r]) for r in rows])
    widest = _LABELS * max((len(c) for c in picture.columns), default=1) + 10
    step = max(1, math.ceil(widest / cell))
    step = next((nice for nice in (1, 2, 5, 10, 20, 50, 100) if nice >= step), step)
    columns = range(0, len(picture.columns), step)
    ax.xaxis.tick_top()
    ax.set_xticks([c + 0.5 for c in columns], [_short(picture.columns[c]) for c in columns])
    if picture.columns_label:
        ax.annotate(
            clean(picture.columns_label),
            (0, 1),
            (-5, 5),
            "axes fraction",
            "offset points",
            ha="right",
            fontsize=_SIZE,
            color=INK,
        )


def _key(ax: Axes, scale: _Scale, unit: str) -> None:
    """The legend: every value by itself where there are few, else the scale's ends and middle."""
    if scale.is_short:
        shares = len(scale.values)
        steps = [scale.step(value) for value in scale.values]
        marks = [(i + 0.5, format_number(v, 3)) for i, v in enumerate(scale.values)]
    else:
        shares = STEPS
        steps = list(range(STEPS))
        marks = [(at, format_number(scale.edge(at), 2)) for at in (0.0, STEPS / 2, float(STEPS))]
    span = max(shares, 3)
    _bare(ax, (0, span), (0, 1))
    for i, step in enumerate(steps):
        ax.add_patch(Rectangle((i, 0), 1, 1, facecolor=HEAT[step], clip_on=False))
    for at, label in marks:
        # The scale's ends are written inwards, so that they stay on the picture.
        ha = "center"
        if not 0 < at < shares:
            ha = "left" if at == 0 else "right"
        ax.annotate(
            label,
            (at, 1),
            (0, 4),
            "data",
            "offset points",
            ha=ha,
            fontsize=_SIZE,
            color=INK,
        )
    ax.annotate(
        clean(unit),
        (0, 0),
        (0, -5),
        "axes fraction",
        "offset points",
        va="top",
        fontsize=_SIZE,
        color=INK,
    )


def _short(name: str) -> str:
    name = clean(name)
    return name if len(name) <= 24 else "…" + name[-23:]
