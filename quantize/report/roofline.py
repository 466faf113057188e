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
    copy = data["ceilings"]["copy"]
    peaks = data["ceilings"]["matmul"]
    every = (row for section in data["sections"].values() for row in section)
    rows = [row for row in every if row["precision"] in peaks]
    intensities = [row["flops"] / row["bytes"] for row in rows]
    speeds = [row["flops"] / row["time"]["seconds"] / 1e12 for row in rows]
    knees = [peak / copy for peak in peaks.values()]
    left = min(intensities + knees) / 2
    right = max(intensities + knees) * 2
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
        these = [at for at, row in enumerate(rows) if row["what"] == name]
        axes.plot(
            [intensities[at] for at in these],
            [speeds[at] for at in these],
            linestyle="none",
            marker=_MARKERS[i % len(_MARKERS)],
            color=_COLOURS[i % len(_COLOURS)],
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
