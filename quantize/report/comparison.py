"""Several conversions of one parent on one page: a table, and accuracy against bits."""

from __future__ import annotations

from collections.abc import Sequence

from quantize.evaluation import Evaluation
from quantize.pictures import Scatter, Table
from quantize.report.model import Headline, Note, Report, Section


def comparison(evaluations: Sequence[Evaluation], sizes: Sequence[int], version: str) -> Report:
    """Make a report of evaluations that one run measured against one parent; sizes:
    bytes on disk of each model."""
    first = evaluations[0]
    basis = (
        f"{first.protocol} on {first.data}, {first.tokens} predictions, {first.numerics} "
        f"numerics, {first.dtype}; parent {first.baseline} (perplexity "
        f"{first.baseline_perplexity:.4f}) measured in the same run"
    )
    best = min(evaluations, key=lambda e: e.kld_mean or 0.0)
    headlines = [
        Headline(
            "Models",
            str(len(evaluations)),
            f"conversions of {first.baseline}",
            len(evaluations),
        ),
        Headline("Lowest KL divergence", f"{best.kld_mean:.5f}", best.model, best.kld_mean),
    ]
    points = [(e.model, e.bits_per_weight, e.kld_mean) for e in evaluations]
    known = [(name, float(x), float(y)) for name, x, y in points if x is not None and y is not None]
    picture = Scatter(
        "Accuracy against bits",
        "KL(parent ‖ model), nats per token. The line joins the models that no other beats in both "
        "figures: the Pareto front.",
        known,
        "bits per quantized weight, scales counted",
        "mean KL divergence",
        front=True,
    )
    missing = ", ".join(name for name, x, _ in points if x is None)
    note = Note(f"Not in the picture, since nothing in it is quantized: {missing}.")
    section = Section(
        "models",
        "Models",
        "",
        [
            *([picture] if known else []),
            *([note] if missing else []),
            _table(evaluations, sizes),
        ],
    )
    return Report("Comparison", f"of {first.baseline}", version, headlines, basis, (), [section])


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points no other beats: none is as low in both coordinates and lower in one."""

    def is_best(x: float, y: float) -> bool:
        return not any(a <= x and b <= y and (a < x or b < y) for a, b in points)

    return [is_best(x, y) for x, y in points]


def _table(evaluations: Sequence[Evaluation], sizes: Sequence[int]) -> Table:
    columns = (
        "model",
        "bits/weight",
        "MB",
        "perplexity",
        "KLD mean",
        "± SE",
        "KLD p99",
        "KLD p99.9",
        "same top-1",
    )
    formats = ("", ".3f", ",.1f", ".4f", ".5f", ".5f", ".4f", ".4f", ".4f")
    rows = [
        (
            e.model,
            e.bits_per_weight,
            size / 1e6,
            e.perplexity,
            e.kld_mean,
            e.kld_stderr,
            e.kld_p99,
            e.kld_p999,
            e.top1_agreement,
        )
        for e, size in zip(evaluations, sizes, strict=True)
    ]
    return Table("All figures", "Size is that of all weights on disk.", columns, rows, formats)
