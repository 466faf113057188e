"""Tables of the figures of evaluations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from quantize.pictures import Cell, Table
from quantize.report.model import number, text

Data = Mapping[str, Any]
_TOGETHER = 4
"""Evaluations that stand beside each other: as many columns as a desk shows without scrolling."""


def evaluation_tables(found: Sequence[Data]) -> Iterator[Table]:
    """All figures of all evaluations, a row for each figure: a column for each would be cut off."""
    hashes = dict.fromkeys((text(data, "data"), text(data, "data_sha256")[:16]) for data in found)
    where = "; ".join(f"{name} {digest or 'unknown'}" for name, digest in hashes)
    caption = f"Tokens, by the start of their SHA-256: {where}."
    for start in range(0, len(found), _TOGETHER):
        part = found[start : start + _TOGETHER]
        cells = {name: [show(data) for data in part] for name, show in _FIGURES.items()}
        rows = [[name, *row] for name, row in cells.items() if any(row)]
        title = "All saved evaluations" + (f", {start + 1} and on" if start else "")
        columns = ["", *(text(data, "protocol", "evaluation") for data in part)]
        yield Table(title, caption, columns, rows)


def _figure(key: str, spec: str) -> Callable[[Data], Cell]:
    def show(data: Data) -> Cell:
        value = number(data, key)
        return None if value is None else format(value, spec)

    return show


def _words(key: str) -> Callable[[Data], Cell]:
    return lambda data: text(data, key)


def _measured(key: str, error: str, digits: int, factor: float = 1.0) -> Callable[[Data], Cell]:
    return lambda data: with_error(data, key, error, digits, factor)


_FIGURES: Mapping[str, Callable[[Data], Cell]] = {
    "data": _words("data"),
    "numerics": _words("numerics"),
    "dtype": _words("dtype"),
    "KV cache": _words("kv_cache"),
    "windows": _figure("windows", ",.0f"),
    "tokens": _figure("tokens", ",.0f"),
    "bits per weight": _figure("bits_per_weight", ".3f"),
    "perplexity": _figure("perplexity", ".3f"),
    "parent's": _figure("baseline_perplexity", ".3f"),
    "ΔNLL": _measured("delta_nll", "delta_nll_stderr", 5),
    "KLD mean": _measured("kld_mean", "kld_stderr", 5),
    "median": _figure("kld_median", ".5f"),
    "p90": _figure("kld_p90", ".5f"),
    "p99": _figure("kld_p99", ".5f"),
    "p99.9": _figure("kld_p999", ".5f"),
    "same top-1, %": _measured("top1_agreement", "top1_stderr", 2, 100.0),
}
"""Name → what a cell shows of an evaluation."""


def with_error(data: Data, value: str, error: str, digits: int, factor: float = 1.0) -> str | None:
    """A figure with its standard error where that is known; None without the figure."""
    mean, stderr = number(data, value), number(data, error)
    if mean is None:
        return None
    shown = f"{mean * factor:.{digits}f}"
    return shown if stderr is None else f"{shown} ± {stderr * factor:.{digits}f}"
