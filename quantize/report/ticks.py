"""Ticks of axes: never fewer than three, at round numbers, and room for them beside the picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.axis import XAxis, YAxis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

_CHARACTER = 7.0  # pixels of its width: hinted fonts draw most letters of this size as seven
LEAST_TICKS = 3  # that an axis has at least: two do not tell whether it is logarithmic
_MOST_TICKS = 8
_SUBS = ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0))
"""Multiples of a power of ten that are ticks, the fewest first."""


def log_ticks(
    axis: XAxis | YAxis, limits: tuple[float, float], show: Callable[[float], str]
) -> None:
    """Ticks at round numbers: as few of a decade as still make three."""
    low, high = sorted(limits)
    for subs in _SUBS:
        ticks = _round_numbers(low, high, subs)
        if len(ticks) >= LEAST_TICKS:
            step = math.ceil(len(ticks) / _MOST_TICKS)
            axis.set_major_locator(FixedLocator(ticks[::step]))
            break
    else:
        axis.set_major_locator(MaxNLocator(nbins=4, min_n_ticks=LEAST_TICKS))
    axis.set_major_formatter(FuncFormatter(lambda value, _: show(value)))
    axis.set_minor_locator(NullLocator())


def _round_numbers(low: float, high: float, subs: Sequence[float]) -> list[float]:
    """Multiples `subs` of powers of ten between two positive numbers."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = (sub * 10.0**k for k in range(first, last + 1) for sub in subs)
    return [tick for tick in every if low <= tick <= high]


def make_room(ax: Axes, width: int) -> None:
    """Move the left side of the axes to where the numbers and their label fit beside it."""
    fig = ax.get_figure()
    if not isinstance(fig, Figure):
        return
    fig.draw_without_rendering()
    widest = max((len(label.get_text()) for label in ax.get_yticklabels()), default=0)
    left = widest * _CHARACTER + (34 if ax.get_ylabel() else 16)
    box = ax.get_position()
    if left > box.x0 * width:
        at = left / width
        ax.set_position((at, box.y0, max(0.2, box.x1 - at), box.height))
