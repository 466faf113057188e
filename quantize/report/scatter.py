"""Named points with their labels, and the front of those that no other beats."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from quantize.pictures import Number, Scatter
from quantize.report.model import clean

_LONGEST = 40
"""Characters of a label; so many fit into the narrowest picture."""
_CHARACTER = 0.6
"""Width of a character, as a part of the text's size: the page's font is not known here, and few are
wider."""
_AWAY = 7
"""Pixels between a point and its label."""
_ROUND = 4
"""Half the size of a point in pixels, which labels keep off."""
Point = tuple[str, float, float]


@dataclass(frozen=True)
class Style:
    """Colours of points, front and labels, and the labels' size in pixels."""

    point: str
    front: str
    ink: str
    size: int


def placed(picture: Scatter, keep: Callable[[Number], float]) -> list[Point]:
    """The points that have a place on both axes. keep: a number's place on the vertical axis, NaN for
    none."""
    return [
        (name, float(x), keep(y))
        for name, x, y in picture.points
        if math.isfinite(x) and abs(x) < _HUGE and not math.isnan(keep(y))
    ]


def scatter(ax: Axes, picture: Scatter, points: Sequence[Point], style: Style) -> None:
    """Draw points, and the front."""
    if picture.log_y:
        ax.set_yscale("log")
    if picture.front and points:
        best = sorted((p for p in points if not any(_beats(q, p) for q in points)), key=_place)
        ax.plot([p[1] for p in best], [p[2] for p in best], color=style.front, linewidth=1.2)
    ax.plot([p[1] for p in points], [p[2] for p in points], "o", color=style.point, markersize=5)
    ax.margins(0.12)


_HUGE = 1e200


def _place(point: Point) -> tuple[float, float]:
    return point[1], -point[2]


def _beats(q: Point, p: Point) -> bool:
    return q[1] <= p[1] and q[2] <= p[2] and q[1:] != p[1:]


@dataclass(frozen=True)
class _Box:
    left: float
    bottom: float
    right: float
    top: float

    def common(self, other: _Box) -> float:
        """Area of what two boxes share."""
        wide = min(self.right, other.right) - max(self.left, other.left)
        high = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(0.0, wide) * max(0.0, high)

    def inside(self, frame: _Box) -> _Box:
        """The same box, moved so far that it lies in the frame; one that is wider begins with it."""
        x = max(frame.left, min(self.left, frame.right - (self.right - self.left))) - self.left
        y = max(frame.bottom, min(self.bottom, frame.top - (self.top - self.bottom))) - self.bottom
        return _Box(self.left + x, self.bottom + y, self.right + x, self.top + y)


def label(ax: Axes, points: Sequence[Point], style: Style) -> None:
    """Write each name where it covers least: no point, no other name, nothing beyond the frame. Where the axes
    stand must be settled."""
    ax.autoscale_view()
    frame = _Box(*(float(v) for v in ax.bbox.extents))
    at = [tuple(map(float, ax.transData.transform((x, y)))) for _, x, y in points]
    taken = [_Box(x - _ROUND, y - _ROUND, x + _ROUND, y + _ROUND) for x, y in at]
    for (name, x, y), (px, py) in zip(points, at, strict=True):
        text = _shown(name)
        width, height = _CHARACTER * style.size * len(text), 1.2 * style.size
        choices = [box.inside(frame) for box in _around(px, py, width, height)]
        box = min(choices, key=lambda choice: sum(map(choice.common, taken)))
        taken.append(box)
        ax.annotate(
            text,
            (x, y),
            (box.left - px, box.bottom - py + 0.2 * style.size),
            textcoords="offset points",
            fontsize=style.size,
            color=style.ink,
        )


def _around(x: float, y: float, width: float, height: float) -> list[_Box]:
    """Places of a label around its point, the best first."""
    sides = [x + _AWAY, x - _AWAY - width, x - width / 2]
    heights = [y + _AWAY / 2, y - height / 2, y - _AWAY / 2 - height]
    beside = [(left, low) for left in sides[:2] for low in heights]
    over = [(sides[2], y + _AWAY), (sides[2], y - _AWAY - height)]
    far = [(sides[2], y + _AWAY + height), (sides[2], y - _AWAY - 2 * height)]
    return [_Box(a, b, a + width, b + height) for a, b in (*beside, *over, *far)]


def _shown(name: str) -> str:
    name = clean(name)
    return name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"
