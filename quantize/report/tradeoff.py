"""The conversion among the others that lie beside it: accuracy against bits, where all were measured
in the same way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantize.pictures import Cell, Scatter, Table
from quantize.report.comparison import front
from quantize.report.model import Item, Note, Section, number, text
from quantize.report.quality import basis, headline_evaluation
from quantize.report.sources import Sources, beside

_ALIKE = ("protocol", "data_sha256", "numerics", "baseline", "dtype")
"""What must be equal for figures to be compared: the cache's rounding is a conversion's own."""


def tradeoff(sources: Sources) -> Section:
    """Scatter and table of this conversion and those beside it; a note where there are none."""
    name = beside(sources.folder, "").name
    mine = headline_evaluation(sources.evaluations)
    if mine is None or number(mine, "kld_mean") is None:
        said = "Not compared with other conversions: it was not measured against its parent."
        return Section("tradeoff", "Beside others", "", [Note(said)])
    found: dict[str, Mapping[str, Any]] = {name: mine}
    apart = []
    for other in sources.others:
        alike = [data for data in other.evaluations if _is_alike(data, mine)]
        if alike:
            found[other.name] = alike[0]
        else:
            apart.append(other.name)
    if len(found) < 2:
        said = "No other conversion that was measured in this way lies beside it."
        command = f"pq compare {sources.command_path} path/to/another"
        command += f" --baseline {sources.parent_path}"
        note = Note(said, command + " --output compare.html")
        return Section("tradeoff", "Beside others", "", [note, *_not_compared(apart)])
    known = {
        key: (bits, kld)
        for key, data in found.items()
        if (bits := number(data, "bits_per_weight")) is not None
        and (kld := number(data, "kld_mean")) is not None
    }
    points = [(f"{key} (this)" if key == name else key, *at) for key, at in known.items()]
    picture = Scatter(
        "Accuracy against bits",
        f"{basis(mine)}. The line joins those that no other beats in both figures.",
        points,
        "bits per quantized weight, scales counted",
        "mean KL divergence, nats",
        front=True,
        log_y=all(kld > 0 for _, kld in known.values()),
    )
    best = dict(zip(known, front(list(known.values())), strict=True))
    rows: list[list[Cell]] = []
    for key, data in sorted(found.items(), key=lambda item: number(item[1], "kld_mean") or 0.0):
        row: list[Cell] = [f"{key} (this)" if key == name else key]
        row += [number(data, "bits_per_weight"), number(data, "kld_mean"), number(data, "kld_p99")]
        row += [number(data, "top1_agreement"), number(data, "perplexity"), text(data, "kv_cache")]
        rows.append([*row, "yes" if best.get(key) else ""])
    # on a phone the first three are seen
    columns = ("conversion", "bits", "KLD", "p99", "top-1", "perplexity", "KV cache", "unbeaten")
    formats = ("", ".3f", ".5f", ".4f", ".4f", ".3f", "", "")
    table = Table("Conversions beside it", "The smallest KLD first.", columns, rows, formats)
    lead = (
        "Conversions in the same folder whose saved evaluations are of the same text and protocol."
    )
    items: list[Item] = [picture, table, *_not_compared(apart)]
    return Section("tradeoff", "Beside others", lead, items)


def _is_alike(data: Mapping[str, Any], mine: Mapping[str, Any]) -> bool:
    known = number(data, "kld_mean") is not None
    return known and all(text(data, key) == text(mine, key) for key in _ALIKE)


def _not_compared(names: list[str]) -> list[Note]:
    said = "Measured on another text, by another protocol or against another parent"
    return [Note(f"{said}, so not compared: {', '.join(names)}.")] if names else []
