"""Pictures drawn with matplotlib, in stand-in colours that `svg` turns into the page's own.

One point of a figure is one CSS pixel. Titles and captions are the page's, not the figure's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from quantize.pictures import Bars, Histogram, Lines, Number, Scatter
from quantize.report.model import clean
from quantize.report.scatter import Style, label, placed, scatter
from quantize.report.ticks import LEAST_TICKS, log_ticks, make_room

# Placeholders that report/svg.py replaces by the page's own colours, light or dark.
INK = "#000001"
RULE = "#000002"
MUTED = "#000003"
SERIES = tuple(f"#0001{i:02x}" for i in range(6))
_DASHES = ("-", (0, (5, 2.5)), (0, (1.5, 1.5)), (0, (7, 2, 1.5, 2)), (0, (3, 1.5)), (0, (9, 3)))
_MARKERS = "osD^vP"
_HUGE = 1e200  # ratios and differences of anything smaller are still floats
_SIZE = 11  # of text, in pixels
_ROW = 24  # pixels of a bar across

Chart = Lines | Bars | Histogram | Scatter
Range = tuple[float, float]


@dataclass(frozen=True)
class Frame:
    """Size of a chart in pixels, and the range of its vertical axis where
    pictures of a group share one."""

    width: int = 460
    height: int = 270
    y_range: Range | None = None


def finite(value: Number) -> float:
    """The value, NaN for anything that has no place on an axis, absurd magnitudes included."""
    return float(value) if value is not None and abs(value) <= _HUGE else math.nan


def positive(value: Number) -> float:
    """The value, NaN for anything that has no place on a logarithmic axis."""
    found = finite(value)
    return found if found >= 1 / _HUGE else math.nan


def format_number(value: float, digits: int = 4) -> str:
    """A number of an axis or a cell, without a needless exponent."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.0f}" if abs(value) >= 10.0 ** (digits - 1) else f"{value:.{digits}g}"


def draw(picture: Chart, frame: Frame) -> Figure:
    """Draw one chart; bars across are as high as they are many."""
    if isinstance(picture, Bars) and picture.across:
        frame = replace(frame, height=80 + _ROW * max(1, len(picture.categories)))
    fig, ax = _axes(picture, frame)
    points, style = [], Style(SERIES[0], SERIES[1], INK, _SIZE)
    if isinstance(picture, Lines):
        _lines(ax, picture)
    elif isinstance(picture, Bars):
        _across(ax, picture) if picture.across else _bars(ax, picture)
    elif isinstance(picture, Histogram):
        _histogram(ax, picture)
    else:
        points = placed(picture, positive if picture.log_y else finite)
        scatter(ax, picture, points, style)
    _finish(ax, picture, frame)
    make_room(ax, frame.width)
    if isinstance(picture, Scatter):
        label(ax, points, style)
    return fig


def shares(picture: Histogram) -> list[float]:
    """Counts as percentages of their sum."""
    known = (finite(count) for count in picture.counts)
    counts = [0.0 if math.isnan(count) else max(0.0, count) for count in known]
    total = sum(counts) or 1.0
    return [100 * count / total for count in counts]


def y_range(pictures: Sequence[Chart]) -> Range | None:
    """The vertical range that holds the curves of all pictures, with a margin; None when
    there is nothing to hold."""
    histograms = [p for p in pictures if isinstance(p, Histogram)]
    if histograms and len(histograms) == len(pictures):
        return 0.0, 1.06 * max(max(shares(p), default=0.0) for p in histograms) or 1.0
    lines = [p for p in pictures if isinstance(p, Lines)]
    log = all(p.log_y for p in lines)
    keep = positive if log else finite
    curves = (curve for p in lines for curve in p.series.values())
    values = [v for curve in curves for v in map(keep, curve) if not math.isnan(v)]
    if not values:
        return None
    low, high = min(values), max(values)
    if log:
        margin = max((high / low) ** 0.06, 1.08)
        return low / margin, high * margin
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin


def _axes(picture: Chart, frame: Frame) -> tuple[Figure, Axes]:
    series = {} if isinstance(picture, Histogram | Scatter) else picture.series
    rows = -(-len(series) // _legend_columns(series, frame)) if len(series) > 1 else 0
    # Margins in pixels.
    left = 62  # numbers and their label
    right = 12  # a rim
    bottom = 44  # two lines of text
    top = 12 + 18 * rows  # the legend's rows
    fig = Figure(figsize=(frame.width / 72, frame.height / 72), dpi=72)
    box = (
        left / frame.width,
        bottom / frame.height,
        1 - (left + right) / frame.width,
        1 - (top + bottom) / frame.height,
    )
    ax = fig.add_axes(box)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(MUTED)
    ax.tick_params(which="both", colors=MUTED, labelcolor=INK, labelsize=_SIZE, length=3, width=0.8)
    ax.tick_params(axis="x", pad=6)
    ax.grid(True, axis="y", color=RULE, linewidth=0.8)
    ax.set_axisbelow(True)
    return fig, ax


def _lines(ax: Axes, picture: Lines) -> None:
    keep = positive if picture.log_y else finite
    few = len(picture.x) <= 40
    for i, (name, values) in enumerate(picture.series.items()):
        ax.plot(
            picture.x,
            [keep(v) for v in values],
            color=SERIES[i % len(SERIES)],
            linestyle=_DASHES[i % len(_DASHES)],
            marker=_MARKERS[i % len(_MARKERS)] if few else None,
            markersize=3.6,
            linewidth=1.6,
            label=name,
        )
    if picture.log_y:
        ax.set_yscale("log")
    if picture.log_x and len(picture.x) > 1 and min(picture.x) >= 0:
        _log_x(ax, picture.x)
    elif all(float(x).is_integer() for x in picture.x):
        ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        if len(set(picture.x)) == 1:
            ax.set_xticks([picture.x[0]])


def _log_x(ax: Axes, x: Sequence[float]) -> None:
    """Ticks at powers of two; the stretch from zero to one is linear, as
    positions count from zero."""
    high = max(*x, 1.0)
    low = min((v for v in x if v > 0), default=1.0)
    first, last = math.floor(math.log2(low)), min(63, math.floor(math.log2(high)))
    powers = [2.0**k for k in range(first, last + 1)]
    step = math.ceil(len(powers) / 7)
    if min(x) > 0:
        ax.set_xscale("log", base=2)
        ticks = powers[::step]
    else:
        ax.set_xscale("symlog", base=2, linthresh=1)
        ticks = [0.0, *powers[::step]]
        ax.set_xlim(-0.15, high * 1.15)
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_minor_locator(NullLocator())


def _bars(ax: Axes, picture: Bars) -> None:
    keep = positive if picture.log_y else finite
    if not picture.categories:
        return  # matplotlib would make up a legend for bars that are not there
    beside = 1 if picture.stacked else max(1, len(picture.series))
    width, middle = 0.8 / beside, (beside - 1) / 2
    below = [0.0] * len(picture.categories)
    for i, (name, values) in enumerate(picture.series.items()):
        shift = 0.0 if picture.stacked else (i - middle) * width
        at = [category + shift for category in range(len(picture.categories))]
        heights = [keep(v) for v in values]
        colour = SERIES[i % len(SERIES)]
        ax.bar(at, heights, width * 0.9, bottom=below, color=colour, label=name)
        if picture.stacked:
            below = [
                b + (h if math.isfinite(h) else 0.0) for b, h in zip(below, heights, strict=True)
            ]
    if picture.log_y:
        ax.set_yscale("log")
    step = max(1, math.ceil(len(picture.categories) / 12))
    ax.set_xticks(
        range(0, len(picture.categories), step),
        [_short(c) for c in picture.categories[::step]],
    )
    if max(map(len, picture.categories), default=0) * len(picture.categories) > 60:
        ax.tick_params(axis="x", labelrotation=30)


def _across(ax: Axes, picture: Bars) -> None:
    """Bars from the left to the right on top of each other, the first category above."""
    rows = range(len(picture.categories))
    left = [0.0] * len(picture.categories)
    for i, (name, values) in enumerate(picture.series.items()):
        known = [0.0 if math.isnan(v) else v for v in map(finite, values)]
        ax.barh(rows, known, 0.7, left=left, color=SERIES[i % len(SERIES)], label=name)
        left = [a + b for a, b in zip(left, known, strict=True)]
    ax.set_yticks(rows, [_short(name) for name in picture.categories])
    ax.set_ylim(len(picture.categories) - 0.4, -0.6)
    ax.grid(False, axis="y")
    ax.grid(True, axis="x", color=RULE, linewidth=0.8)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=5, min_n_ticks=LEAST_TICKS))


def _histogram(ax: Axes, picture: Histogram) -> None:
    heights = shares(picture)
    low, high = picture.edges[0], picture.edges[-1]
    points = [p for p in picture.points if low <= p <= high]
    if len(points) <= 40:  # 8-bit code points would be a grey wall
        ax.vlines(
            points,
            0,
            1,
            transform=ax.get_xaxis_transform(),
            color=MUTED,
            linewidth=0.7,
            linestyle=(0, (2, 2)),
        )
    ax.stairs(heights, picture.edges, fill=True, color=SERIES[0], alpha=0.28, linewidth=0)
    ax.stairs(heights, picture.edges, color=SERIES[0], linewidth=1.3)
    if picture.log_x and low > 0:
        ax.set_xscale("log")
        log_ticks(ax.xaxis, (low, high), format_number)
    else:
        ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    ax.set_xlim(low, high)
    ax.set_ylim(0, max(heights, default=0) * 1.06 or 1)
    ax.set_ylabel(f"% of {clean(picture.counted)}", color=INK, fontsize=_SIZE)


def _finish(ax: Axes, picture: Chart, frame: Frame) -> None:
    if frame.y_range:
        ax.set_ylim(frame.y_range)
    across = isinstance(picture, Bars) and picture.across
    if ax.get_yscale() == "log":
        log_ticks(ax.yaxis, ax.get_ylim(), format_number)
    elif not across:
        ax.yaxis.set_major_locator(MaxNLocator(nbins=5, min_n_ticks=LEAST_TICKS))
        ax.yaxis.set_major_formatter(_format(format_number))
    if across or not isinstance(picture, Bars):
        ax.xaxis.set_major_formatter(_format(format_number))
    x_label, y_label = (getattr(picture, f"{axis}_label", "") for axis in "xy")
    if across:
        x_label, y_label = y_label, ""
    ax.set_xlabel(clean(x_label), color=INK, fontsize=_SIZE)
    if label := y_label:
        ax.set_ylabel(clean(label), color=INK, fontsize=_SIZE)
    handles, names = ax.get_legend_handles_labels()
    if len(handles) > 1:
        ax.legend(
            handles,
            [_short(n) for n in names],
            loc="lower left",
            bbox_to_anchor=(0, 1.0),
            ncols=_legend_columns(names, frame),
            frameon=False,
            fontsize=_SIZE,
            labelcolor=INK,
            borderaxespad=0.2,
            borderpad=0,
            handlelength=2.4,
            columnspacing=1.4,
        )


def _legend_columns(names: Collection[str], frame: Frame) -> int:
    """So many that the widest name fits as often beside itself."""
    widest = max(len(_short(name)) for name in names) * _SIZE * 0.6 + 50
    return max(1, min(len(names), 4, int((frame.width - 62) // widest)))


def _format(show: Callable[[float], str]) -> FuncFormatter:
    return FuncFormatter(lambda value, _: show(value))


def _short(name: str) -> str:
    name = clean(name)
    return name if len(name) <= 28 else name[:27] + "…"
