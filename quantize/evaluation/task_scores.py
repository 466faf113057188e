"""Statistics of task scores: standard errors of every metric that is understood.

Every metric that is understood here is a smooth function of means over documents. `influence`
linearizes it: the value moves by influence/n when one document's weight rises by one part in n.
Standard errors are those of the mean of the influences (the delta method). For two models on the
same documents the influences of a difference or a ratio are formed per document first, so what both
models share (hard documents) cancels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

Aggregation = Literal["mean", "perplexity", "weighted_perplexity", "bits_per_byte"]
"""Names as in lm-eval. perplexity: exp(−mean). weighted_perplexity: exp(−Σx/Σw).
bits_per_byte: −Σx/Σw/ln 2."""

Value = float | Sequence[float]
"""What one document gives: a number, or (log-likelihood, its number of words or bytes)."""

PLAIN: tuple[Aggregation, ...] = ("mean", "perplexity")
WEIGHTED: tuple[Aggregation, ...] = ("weighted_perplexity", "bits_per_byte")


def aggregation_of(values: Sequence[Value], reported: float) -> Aggregation | None:
    """Which aggregation makes `reported` of `values`; None for one that is not understood here."""
    if not values or not math.isfinite(reported):
        return None
    for name in WEIGHTED if isinstance(values[0], Sequence) else PLAIN:
        if math.isclose(aggregate(name, values), reported, rel_tol=1e-6, abs_tol=1e-9):
            return name
    return None


def aggregate(aggregation: Aggregation, values: Sequence[Value]) -> float:
    """The metric's value over documents; inf where a perplexity is too large for a float."""
    mean = _ratio(values)
    if aggregation == "mean":
        return mean
    if aggregation == "bits_per_byte":
        return -mean / math.log(2)
    return math.exp(-mean) if -mean < 700 else math.inf


def influence(aggregation: Aggregation, values: Sequence[Value]) -> list[float]:
    """n × the derivative of the metric by each document's weight; sums to zero.

    With documents (x, w), mean ratio r = Σx/Σw (w = 1 for plain numbers): (x − r w) /
    mean(w), times the derivative of the metric by r, which is 1, −metric for perplexities
    and −1/ln 2 for bits per byte.
    """
    pairs = _pairs(values)
    ratio = _ratio(values)
    slope = {"mean": 1.0, "bits_per_byte": -1 / math.log(2)}.get(aggregation)
    if slope is None:
        slope = -aggregate(aggregation, values)
    scale = slope * len(pairs) / math.fsum(w for _, w in pairs)
    return [(x - ratio * w) * scale for x, w in pairs]


def standard_error(influences: Sequence[float]) -> float | None:
    """Standard error of a metric from its influences: sqrt(Σ² / (n (n − 1)));
    None below two documents."""
    n = len(influences)
    if n < 2:
        return None
    return math.sqrt(math.fsum(value * value for value in influences) / (n * (n - 1)))


def _pairs(values: Sequence[Value]) -> list[tuple[float, float]]:
    return [
        (value[0], value[1]) if isinstance(value, Sequence) else (value, 1.0) for value in values
    ]


def _ratio(values: Sequence[Value]) -> float:
    pairs = _pairs(values)
    return math.fsum(x for x, _ in pairs) / math.fsum(w for _, w in pairs)
