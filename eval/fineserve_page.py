"""Tables and picture of docs/plan-fineserve.md from eval/results/fineserve.json.

python eval/fineserve_page.py
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import render  # the script beside this one
from fineserve import BASELINES
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "eval" / "results" / "fineserve.json"
PAGE = ROOT / "docs" / "plan-fineserve.md"
PICTURE = ROOT / "docs" / "pictures" / "plan-fineserve.svg"
_GREY = "#7c879b"
"""To be read on light and on dark pages."""
_LINES = ("FineServe", *BASELINES)
_COLOURS = ("#c2410c", "#3949ab", "#00796b", _GREY, "#a16207", "#7e22ce")


def series(rows: Sequence[dict[str, Any]], field: str) -> dict[str, list[float]]:
    """System → values by rate, in the order of the rows."""
    made: dict[str, list[float]] = {}
    for row in rows:
        made.setdefault(row["system"], []).append(row[field])
    return made


def cells(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """(setting, load) → its rows."""
    made: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        made.setdefault((row["setting"], row["load"]), []).append(row)
    return made


def by_rate(rows: Sequence[dict[str, Any]], field: str) -> str:
    """A table: systems down, rates across."""
    rates = sorted({row["rate"] for row in rows})
    lines = ["| | " + " | ".join(f"{rate:g}/s" for rate in rates) + " |"]
    lines.append("|---|" + "---:|" * len(rates))
    for name, values in series(rows, field).items():
        shown = [f"{100 * v:.1f}" if field == "attainment" else f"{v:,.0f}" for v in values]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def most(rows: Sequence[dict[str, Any]], field: str, baseline: str) -> tuple[float, float]:
    """The largest FineServe / baseline over all rates, and the rate where it is."""
    ours, theirs = series(rows, field)["FineServe"], series(rows, field)[baseline]
    rates = sorted({row["rate"] for row in rows})
    return max((a / max(b, 1e-9), rate) for a, b, rate in zip(ours, theirs, rates, strict=True))


def claim(data: dict[str, Any]) -> str:
    """The largest ratios beside what FineServe's abstract says."""
    lines = [
        "| setting | requests | beside | attainment, up to | tokens/s, up to | within the goal, up to |",
        "|---|---|---|---:|---:|---:|",
    ]
    fields = ("attainment", "tokens_per_second", "goodput")
    for part in ("1 GPU", "8 GPUs"):
        for (setting, load), rows in cells(data.get(part, [])).items():
            for name in BASELINES:
                found = [most(rows, field, name) for field in fields]
                shown = " | ".join(f"{ratio:.2f}× at {rate:g}/s" for ratio, rate in found)
                lines.append(f"| {setting} | {load} | {name} | {shown} |")
    return "\n".join(lines) + "\n"


def slabs(rows: Sequence[dict[str, Any]]) -> str:
    """The table of ways to share memory."""
    lines = [
        "| memory | slab, KiB | largest group, MiB | rate | lost in slabs | preemptions | goals met |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['way']} | | | {row['rate']:g}/s | {row['error']} | | |")
            continue
        sizes = ", ".join(f"{size:,g}" for size in row["slab_kib"])
        lines.append(
            f"| {row['way']} | {sizes} | {row['group_mib']:,g} | {row['rate']:g}/s | "
            f"{100 * row['waste']:.1f} % | {row['preemptions']:,} | {100 * row['attainment']:.1f} % |"
        )
    return "\n".join(lines) + "\n"


def draw(data: dict[str, Any]) -> None:
    """Attainment and tokens/s over rates, a column for each setting and load."""
    found = [cell for part in ("1 GPU", "8 GPUs") for cell in cells(data.get(part, [])).items()]
    figure = Figure(figsize=(2.7 * len(found), 4.6), layout="constrained")
    axes = figure.subplots(2, len(found), squeeze=False)
    for column, ((setting, load), rows) in enumerate(found):
        rates = sorted({row["rate"] for row in rows})
        for line, (field, label) in enumerate(
            (("attainment", "share of requests in time"), ("tokens_per_second", "tokens/s"))
        ):
            ax = axes[line][column]
            values = series(rows, field)
            for name, colour in zip(_LINES, _COLOURS, strict=True):
                wide = 2.2 if name == "FineServe" else 1.3
                ax.plot(rates, values[name], color=colour, label=name, linewidth=wide)
            ax.set_ylim(bottom=0)
            ax.tick_params(colors=_GREY, labelsize=7)
            for spine in ax.spines.values():
                spine.set_color(_GREY)
            if column == 0:
                ax.set_ylabel(label, color=_GREY, fontsize=8)
        axes[0][column].set_title(f"{setting}\n{load}", color=_GREY, fontsize=8)
        axes[1][column].set_xlabel("requests/s", color=_GREY, fontsize=8)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=6, fontsize=7, labelcolor=_GREY,
        frameon=False,
    )  # fmt: skip
    figure.savefig(PICTURE, transparent=True, metadata={"Date": None})


def main() -> None:
    """Rewrite the sections and the picture."""
    data = json.loads(RESULTS.read_text(encoding="utf-8"))
    text = PAGE.read_text(encoding="utf-8")
    text = render.put(text, "claim", claim(data), PAGE)
    found = {key: rows for part in ("1 GPU", "8 GPUs") for key, rows in cells(data[part]).items()}
    for field in ("attainment", "tokens_per_second"):
        shown = [f"{s}, {load}:\n\n{by_rate(rows, field)}" for (s, load), rows in found.items()]
        text = render.put(text, field, "\n".join(shown), PAGE)
    text = render.put(text, "time-sliced", by_rate(data["time-sliced"], "attainment"), PAGE)
    text = render.put(text, "slabs", slabs(data["fragmentation"]), PAGE)
    PAGE.write_text(text, encoding="utf-8")
    draw(data)


if __name__ == "__main__":
    main()
