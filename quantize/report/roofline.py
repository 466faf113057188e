"""A roofline: operations a second of kernels against operations for each byte moved,
below what the machine can do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from quantize.errors import OutputError

_COLOURS = (
    "#4269d0",
    "#ff725c",
    "#3ca951",
    "#a463f2",
    "#9c6b4e",
    "#97bbf5",
    "#efb118",
    "#6cc5b0",
    "#ff8ab7",
)
_MARKERS = "os^DvPX"


def roofline(data: Mapping[str, Any]) -> Figure:
    """Draw a saved record of `pq bench`: a point for each row that multiplies,
    a roof for each precision."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log")
    rows = [row for rows in data["sections"].values() for row in rows if row["precision"] in data["ceilings"]["matmul"]]
    places = [(row["flops"] / row["bytes"], row["flops"] / row["time"]["seconds"] / 1e12) for row in rows]
    copy, peaks = data["ceilings"]["copy"], data["ceilings"]["matmul"]
    knees = [peak / copy for peak in peaks.values()]
    left, right = min([x for x, _ in places] + knees) / 2, max([x for x, _ in places] + knees) * 2
    for (name, peak), knee, dash in zip(peaks.items(), knees, ("--", "-"), strict=False):
        roof = [left * copy / 1e12, peak / 1e12, peak / 1e12]
        axes.plot(
            [left, knee, right],
            roof,
            dash,
            color="#555555",
            linewidth=1,
            label=f"{name} ceiling",
        )
    names = list(dict.fromkeys(row["what"] for row in rows))
    for i, name in enumerate(names):
        x, y = zip(
            *(place for place, row in zip(places, rows, strict=True) if row["what"] == name),
            strict=True,
        )
        colour, marker = _COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]
        axes.plot(
            x,
            y,
            linestyle="none",
            marker=marker,
            color=colour,
            markersize=5,
            alpha=0.8,
            label=name,
        )
    axes.set_xlabel("operations for each byte that must be moved")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(f"{data['device']}: copy {copy / 1e9:,.0f} GB/s", fontsize=10)
    axes.grid(which="major", color="#dddddd", linewidth=0.5)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


def write_roofline(data: Mapping[str, Any], path: Path) -> None:
    """Write `roofline(data)` as SVG or PNG, by the file's ending;
    OutputError where that cannot be."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever style the user has set up
        matplotlib.rcParams.update({"svg.hashsalt": "pq"})
        metadata = {"Date": None} if path.suffix == ".svg" else None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            roofline(data).savefig(path, dpi=150, metadata=metadata)
        except OSError as err:
            raise OutputError(
                f"{path}: cannot be written ({err.strerror}); choose another file",
            ) from None
