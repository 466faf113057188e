"""DSDE's stability signal as a diagnostic: do bursts of divergence show where a quantized model goes
wrong?

The signal of a token takes the KL values up to and with it. A token goes wrong where the draft's
likeliest token is not the parent's ('flip'). What flags a token by its own two distributions knows
the flip already; what counts for a warning is whether signals of the past foretell flips to come.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from quantize.draft.replay import Array
from quantize.draft.trace import Trace
from quantize.serving.speculation.dsde import PAPER, stability

FLAGGED = 0.1
"""Share of tokens that a signal flags: those where it is largest."""
_SETTLED = 10
"""Tokens of a text before the signal is looked at: the paper's short window."""


@dataclass(frozen=True)
class Detector:
    """How well a signal finds flips."""

    name: str
    area: float
    """Chance that a flipped token has a larger signal than another one (ROC area); .5 says nothing."""
    precision: float
    """Share of flips among the flagged tokens."""
    recall: float
    """Share of all flips that are flagged."""
    ahead: float
    """ROC area against a flip at the token after."""


@dataclass(frozen=True)
class Bursts:
    """The diagnostic of one trace."""

    flips: float
    """Share of tokens where the likeliest tokens differ: what flagging at random would give as
    precision."""
    tokens: int
    detectors: tuple[Detector, ...]
    cache_correlation: float | None = None
    """Of the draft's KL with that of the parent on an INT4 cache, token by token; None where that was
    not run."""
    cache_flip_area: float | None = None
    """ROC area of the cache's KL against the draft's flips."""
    text: int = 0
    """The text whose curves are shown: the one of the largest burst."""
    curves: dict[str, list[float]] = field(default_factory=dict, repr=False)
    """kl, wvir, flip[, cache_kl] at each token of that text."""


def bursts(trace: Trace, cache: Trace | None = None) -> Bursts:
    """Measure the signal on a trace. cache: the parent on an INT4 cache, on the same rollout."""
    wvir = [_stability(values) for values in trace["kl"]]
    scaled = [
        np.expm1(np.minimum(2 * _recent(kl), 50.0)) * w
        for kl, w in zip(trace["kl"], wvir, strict=True)
    ]
    signals = {
        "KL": list(trace["kl"]),
        "WVIR": wvir,
        "SF·WVIR": scaled,
        "draft's entropy": list(trace["entropy"]),
        "draft's small margin": [-values for values in trace["margin"]],
    }
    flips = [1 - values for values in trace["top1"]]
    detectors = tuple(_detector(name, values, flips) for name, values in signals.items())
    now = _settled(flips)
    correlation = area = None
    if cache is not None:
        theirs, ours = _settled(cache["kl"]), _settled(trace["kl"])
        if len(ours) > 2 and np.std(theirs) > 0 and np.std(ours) > 0:
            correlation = float(np.corrcoef(theirs, ours)[0, 1])
        area = roc_area(theirs, now > 0)
    peaks = [float(values[_SETTLED:].max(initial=0.0)) for values in wvir]
    text = int(np.argmax(peaks))
    curves = {
        "kl": trace["kl"][text].tolist(),
        "wvir": wvir[text].tolist(),
        "flip": flips[text].tolist(),
    }
    if cache is not None:
        curves["cache_kl"] = cache["kl"][text].tolist()
    share = float(now.mean()) if len(now) else math.nan
    return Bursts(share, len(now), detectors, correlation, area, text, curves)


def _stability(kl: Array) -> Array:
    return np.array([stability(kl[: t + 1].tolist(), PAPER) for t in range(len(kl))])


def _recent(kl: Array, count: int = 4) -> Array:
    """Mean of the last `count` values at each place: about a step's."""
    sums = np.cumsum(np.concatenate([[0.0], kl]))
    ends = np.arange(1, len(kl) + 1)
    starts = np.maximum(0, ends - count)
    result: Array = (sums[ends] - sums[starts]) / (ends - starts)
    return result


def _settled(values: Sequence[Array], after: int = 0) -> Array:
    """All texts behind their first tokens; `after`: shifted so much towards the end."""
    parts = [v[_SETTLED + after :] for v in values]
    return np.concatenate(parts) if parts else np.zeros(0)


def _detector(name: str, signal: Sequence[Array], flips: Sequence[Array]) -> Detector:
    values, wrong = _settled(signal), _settled(flips) > 0
    order = np.argsort(-values, kind="stable")[: max(1, round(FLAGGED * len(values)))]
    found = int(wrong[order].sum())
    before = np.concatenate([v[_SETTLED:-1] for v in signal])
    after = _settled(flips, 1) > 0
    return Detector(
        name,
        roc_area(values, wrong),
        found / len(order),
        found / max(1, int(wrong.sum())),
        roc_area(before, after),
    )


def roc_area(values: Array, wrong: NDArray[np.bool_]) -> float:
    """Mann–Whitney: chance that a value of `wrong` is above one of the others, ties half; nan where
    either is missing."""
    n, m = int(wrong.sum()), int((~wrong).sum())
    if not n or not m:
        return math.nan
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    ranks = np.empty(len(values))
    firsts = np.searchsorted(ordered, ordered, side="left")
    lasts = np.searchsorted(ordered, ordered, side="right")
    ranks[order] = (firsts + lasts + 1) / 2
    return float((ranks[wrong].sum() - n * (n + 1) / 2) / (n * m))
