"""Several conversions of one parent side by side: a table, and accuracy against bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quantize.evaluation import Evaluation
from quantize.pictures import Cell, Scatter, Table
from quantize.report.model import Headline, Note, Report, Section


@dataclass(frozen=True)
class Row:
    """One model of a comparison."""

    name: str
    """How it is told from the others."""
    figures: Evaluation
    bits: float | None
    """Mean stored bits of quantized weights, scales counted; None without any."""
    bytes: int
    """Of all weights on disk."""
    recipe: str | None = None
    """Which it was made with; None where pq did not make it."""
    tokens_per_second: float | None = None
    """Decoding one sequence in transformers; None: not measured."""


@dataclass(frozen=True)
class Parent:
    """What all models of a comparison were made of."""

    name: str
    bytes: int
    tokens_per_second: float | None = None


def comparison(
    rows: Sequence[Row], parent: Parent, version: str, notes: Sequence[str] = ()
) -> Report:
    """Make a report of evaluations that one run measured against one parent. notes: what else is to
    be known, a line each."""
    first = rows[0].figures
    basis = (
        f"{first.protocol} on {first.data}, {first.tokens} predictions, {first.numerics} "
        f"numerics, {first.dtype}; parent {parent.name} (perplexity "
        f"{first.baseline_perplexity:.4f}) measured in the same run"
    )
    best = min(rows, key=lambda row: row.figures.kld_mean or 0.0)
    headlines = [
        Headline("Models", str(len(rows)), f"conversions of {parent.name}", len(rows)),
        Headline(
            "Lowest KL divergence",
            f"{best.figures.kld_mean:.5f}",
            best.name,
            best.figures.kld_mean,
        ),
    ]
    drawn = [point for row in rows if (point := _point(row)) is not None]
    picture = Scatter(
        "Accuracy against bytes",
        "KL(parent ‖ model), nats per token, against the bytes of the weights that a token is "
        "multiplied with (embedding table not counted; of experts, those that it visits). The line "
        "joins the models that no other beats in both figures: the Pareto front.",
        drawn,
        "MB of weights read per token",
        "mean KL divergence",
        front=True,
        log_y=True,
    )
    left = [row.name for row in rows if _point(row) is None]
    lines = list(notes)
    if left:
        lines.append(
            "Not in the picture, since bytes per token are not known or nothing diverges: "
            f"{', '.join(left)}."
        )
    section = Section(
        "models",
        "Models",
        "",
        [*([picture] if drawn else []), *map(Note, lines), table(rows, parent)],
    )
    return Report("Comparison", f"of {parent.name}", version, headlines, basis, (), [section])


def _point(row: Row) -> tuple[str, float, float] | None:
    """Its place in the picture; None without one."""
    x, y = row.figures.bytes_per_token, row.figures.kld_mean
    return None if x is None or y is None or y <= 0 else (row.name, x / 1e6, y)


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points no other beats: none is as low in both coordinates and lower in one."""

    def is_best(x: float, y: float) -> bool:
        return not any(a <= x and b <= y and (a < x or b < y) for a, b in points)

    return [is_best(x, y) for x, y in points]


def best_of(rows: Sequence[Row]) -> list[bool]:
    """Which models no other beats in bytes per token and divergence; never one whose bytes per token
    are not known."""
    known = [row.figures.bytes_per_token is not None for row in rows]
    points = [
        (row.figures.bytes_per_token or 0.0, row.figures.kld_mean or 0.0)
        for row, there in zip(rows, known, strict=True)
        if there
    ]
    ahead = iter(front(points))
    return [there and next(ahead) for there in known]


def activation_bits(figures: Evaluation) -> str:
    """`16`, `8`, or `8, 16` where linears differ."""
    return ", ".join(map(str, figures.activation_bits))


def table(rows: Sequence[Row], parent: Parent) -> Table:
    """All figures, the parent's in the first row. A column in which no model has a figure of its own
    is left out."""
    first = rows[0].figures
    lines: list[dict[str, Cell]] = [
        {
            "model": parent.name,
            "recipe": None,
            "bits/weight": 16.0,
            "act. bits": "16",
            "KV bits": 16.0,
            "MB": parent.bytes / 1e6,
            "MB/token": _millions(first.baseline_bytes_per_token),
            "M/token": _millions(first.baseline_activated_parameters),
            "tokens/s": parent.tokens_per_second,
            "perplexity": first.baseline_perplexity,
        }
    ]
    for row in rows:
        e = row.figures
        lines.append(
            {
                "model": row.name,
                "recipe": row.recipe,
                "bits/weight": row.bits,
                "act. bits": activation_bits(e),
                "KV bits": e.kv_bits,
                "MB": row.bytes / 1e6,
                "MB/token": _millions(e.bytes_per_token),
                "M/token": _millions(e.activated_parameters),
                "tokens/s": row.tokens_per_second,
                "perplexity": e.perplexity,
                "KLD mean": e.kld_mean,
                "± SE": e.kld_stderr,
                "KLD p99": e.kld_p99,
                "KLD p99.9": e.kld_p999,
                "same top-1": e.top1_agreement,
            }
        )
    kept = [name for name in _FORMATS if _is_told(name, lines)]
    return Table(
        "All figures",
        "MB: all weights on disk. MB/token and M/token: bytes and millions of the weights that a token is "
        "multiplied with.",
        kept,
        [[line.get(name) for name in kept] for line in lines],
        [_FORMATS[name] for name in kept],
    )


_FORMATS = {
    "model": "",
    "recipe": "",
    "bits/weight": ".3f",
    "act. bits": "",
    "KV bits": ".3g",
    "MB": ",.1f",
    "MB/token": ",.1f",
    "M/token": ",.2f",
    "tokens/s": ",.1f",
    "perplexity": ".4f",
    "KLD mean": ".5f",
    "± SE": ".5f",
    "KLD p99": ".4f",
    "KLD p99.9": ".4f",
    "same top-1": ".4f",
}
"""Columns and how their figures are written."""


def _is_told(name: str, lines: Sequence[Mapping[str, Cell]]) -> bool:
    parents, *own = [line.get(name) for line in lines]
    if name == "recipe" and all(line.get(name) in (None, line["model"]) for line in lines):
        return False
    if name == "M/token":  # where nothing was restructured it tells nothing
        return any(value is not None and value != parents for value in own)
    return any(value is not None for value in own)


def _millions(value: float | None) -> float | None:
    return None if value is None else value / 1e6
