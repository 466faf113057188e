"""Named points: no label is cut off or covers another, and the front goes through its members alone."""

from __future__ import annotations

import random

import pytest

from quantize.pictures import Scatter
from quantize.report.draw import SERIES, Frame, draw

Box = tuple[float, float, float, float]


def boxes(points: list[tuple[str, float, float]], frame: Frame) -> tuple[Box, list[Box]]:
    """The axes and all labels, in pixels, of characters as wide as those of a page."""
    ax = draw(Scatter("", "", points, "x", "y", front=True, log_y=True), frame).axes[0]
    found = []
    for text in ax.texts:
        x, y = ax.transData.transform(text.xy)
        dx, dy = text.xyann
        left, low = x + dx, y + dy
        found.append((left, low, left + 6.2 * len(text.get_text()), low + 9))
    return tuple(ax.bbox.extents), found  # type: ignore[return-value]


@pytest.mark.parametrize("frame", [Frame(440, 300), Frame(308, 210)])
@pytest.mark.parametrize("seed", range(3))
def test_labels_stay_within_the_axes(frame: Frame, seed: int):
    rng = random.Random(seed)
    names = ["a", "fireq-paper-linear", "a name that is as long as names get", "w4a8kv4", "sbvr"]
    points = [(name, rng.uniform(1, 5e3), 10 ** rng.uniform(-5, 1)) for name in names]
    (left, bottom, right, top), labels = boxes(points, frame)
    assert len(labels) == len(points)
    for a, b, c, d in labels:
        assert left - 1 <= a
        assert c <= right + 1
        assert bottom - 1 <= b
        assert d <= top + 1


def test_labels_of_near_points_do_not_cover_each_other():
    points = [(f"conversion-{i}", 100 + i, 1e-3 * (1 + i / 50)) for i in range(4)]
    _, labels = boxes(points, Frame(440, 300))
    for i, (a, b, c, d) in enumerate(labels):
        for e, f, g, h in labels[:i]:
            wide, high = min(c, g) - max(a, e), min(d, h) - max(b, f)
            assert wide <= 0 or high <= 0


def test_the_front_goes_through_its_members_alone():
    points = [("a", 1.0, 0.3), ("b", 2.0, 0.02), ("c", 2.5, 0.025), ("d", 3.0, 0.01)]
    ax = draw(Scatter("", "", [*points, ("zero", 1.0, 0.0)], front=True, log_y=True), Frame())
    (line,) = [one for one in ax.axes[0].lines if one.get_color() == SERIES[1]]
    assert list(zip(*line.get_data(), strict=True)) == [(1.0, 0.3), (2.0, 0.02), (3.0, 0.01)]
    assert line.get_drawstyle() == "default"
    assert ax.axes[0].get_yscale() == "log"
    assert {text.get_text() for text in ax.axes[0].texts} == {"a", "b", "c", "d"}
