"""What foretells acceptance, and a policy fitted to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quantize.draft.policies import Costs, Outcome, Story, play, stories
from quantize.draft.replay import Array, Interval
from quantize.draft.trace import Trace
from quantize.serving.speculation.dsde import PAPER, stability
from quantize.serving.speculation.fitted import FEATURES, KEEP, Fitted, features_of
from quantize.serving.speculation.policy import Static

AHEAD = 6
"""Tokens whose acceptance is foretold: a common draft."""
_RIDGE = 1e-3
"""Of the logistic regression, by observation: weights of signals that say the same stay small."""
_LENGTHS = range(1, 21)


@dataclass(frozen=True)
class Fit:
    """A fitted policy beside the best static length, both chosen on one half of the texts."""

    policy: Fitted
    static: Static
    fitted_speed_up: Interval
    """On the other half."""
    static_speed_up: Interval
    gain: Interval
    """Difference of the two, texts paired."""

    @property
    def wins(self) -> bool:
        """Whether the fitted policy is better beyond its error: only then is it offered."""
        return self.gain.low is not None and self.gain.low > 0


def fit(trace: Trace, costs: Costs, repeats: int = 4, seed: int = 0) -> Fit | None:
    """Fit on every other text of a trace, choose the best static length there, and compare both on
    the other texts; None with fewer than eight texts, which leave no interval to speak of.

    Texts of each data set come to both halves.
    """
    told = stories(trace, repeats, seed)
    texts = sorted({story.text for story in told})
    if len(texts) < 8:
        return None
    half = set(texts[::2])
    learn = [story for story in told if story.text in half]
    rest = [story for story in told if story.text not in half]
    return _judged(learn, rest, costs)


def carried_over(trace: Trace, other: Trace, costs: Costs, repeats: int = 4) -> Fit:
    """Fit on all texts of one trace and compare on another's, of other text."""
    return _judged(stories(trace, repeats), stories(other, repeats), costs)


def _judged(learn: Sequence[Story], rest: Sequence[Story], costs: Costs) -> Fit:
    static = max((Static(g) for g in _LENGTHS), key=lambda p: play(p, learn).speed_up(costs).value)
    policy = fitted_on(learn, costs)
    ours, theirs = play(policy, rest), play(static, rest)
    return Fit(
        policy,
        static,
        ours.speed_up(costs),
        theirs.speed_up(costs),
        difference(ours, theirs, costs),
    )


def fitted_on(told: Sequence[Story], costs: Costs) -> Fitted:
    """Logistic regression of acceptance on FEATURES at every token of the stories, and the rate that
    the policy then reaches there."""
    rows: list[tuple[float, ...]] = []
    seen: list[float] = []
    mean = float(np.mean(np.concatenate([story.outcomes for story in told])))
    for story in told:
        running = mean
        for signal, outcome in zip(story.signals, story.outcomes.tolist(), strict=True):
            rows.append(features_of(signal, running))
            seen.append(float(outcome))
            running = KEEP * running + (1 - KEEP) * outcome
    weights = logistic(np.array(rows), np.array(seen))
    cost = costs.draft + costs.check_token
    rate = 1.0
    for _ in range(4):  # the rate that a rule reaches is the one it should reckon with
        policy = Fitted(tuple(weights.tolist()), cost, rate, mean)
        rate = play(policy, told).speed_up(costs).value
    return Fitted(tuple(weights.tolist()), cost, rate, mean)


def logistic(rows: Array, seen: Array) -> Array:
    """Weights [F] of rows [n, F] in the log-odds of `seen` [n], by Newton's method with a ridge on
    all but the constant."""
    ridge = _RIDGE * len(rows) * np.diag([0.0, *[1.0] * (rows.shape[1] - 1)])
    scale = np.maximum(rows.std(0), 1e-9)
    scale[0] = 1.0
    scaled = rows / scale
    weights = np.zeros(rows.shape[1])
    for _ in range(30):
        chance = 1 / (1 + np.exp(-np.clip(scaled @ weights, -30, 30)))
        slope = scaled.T @ (seen - chance) - ridge @ weights
        bend = (scaled * (chance * (1 - chance) + 1e-9)[:, None]).T @ scaled + ridge
        move = np.linalg.solve(bend, slope)
        weights = weights + move
        if np.abs(move).max() < 1e-9:
            break
    result: Array = weights / scale
    return result


def difference(ours: Outcome, theirs: Outcome, costs: Costs) -> Interval:
    """Speed-up of one policy less that of another on the same texts, with its 95 % interval: both
    ratios linearized, texts paired."""
    a, b = ours.time(costs), theirs.time(costs)
    first, second = ours.speed_up(costs).value, theirs.speed_up(costs).value
    moved = (ours.tokens - first * a) / a.sum() - (theirs.tokens - second * b) / b.sum()
    kept = moved[ours.steps > 0]
    n = len(kept)
    value = first - second
    if n < 2:
        return Interval(value)
    half = 2.0 * math.sqrt(n / (n - 1) * float(np.square(kept).sum()))
    return Interval(value, value - half, value + half)


def signals(trace: Trace, ahead: int = AHEAD) -> dict[str, tuple[float, float]]:
    """Signal → its correlation with the acceptance of the very token and with the expected number
    accepted of the next `ahead` tokens (what a length settled beforehand can go by).

    Signals of the draft are of the token to be drafted; those of the past end with the token before.
    """
    columns: dict[str, list[float]] = {}
    now: list[float] = []
    then: list[float] = []
    for text, accept in enumerate(trace["accept"]):
        kl = trace["kl"][text]
        past = accept[:1].mean() if len(accept) else 0.0
        for t in range(PAPER.long, len(accept) - ahead):
            past = _running(accept[:t])
            ratio = stability(kl[:t].tolist(), PAPER)
            mean = float(kl[t - 4 : t].mean())
            found = {
                "draft's confidence": trace["confidence"][text][t],
                "draft's margin": trace["margin"][text][t],
                "draft's entropy": trace["entropy"][text][t],
                "running acceptance": past,
                "position": t,
                "mean KL of the last 4": mean,
                "WVIR": ratio,
                "SF·WVIR": math.expm1(2 * mean) * ratio,
            }
            for name, value in found.items():
                columns.setdefault(name, []).append(float(value))
            now.append(float(accept[t]))
            then.append(float(np.cumprod(accept[t : t + ahead]).sum()))
    return {
        name: (_correlation(values, now), _correlation(values, then))
        for name, values in columns.items()
    }


def _running(accept: Array) -> float:
    weights = KEEP ** np.arange(len(accept) - 1, -1, -1)
    return float((weights * accept).sum() / weights.sum())


def _correlation(a: Sequence[float], b: Sequence[float]) -> float:
    if len(a) < 3 or np.std(a) == 0 or np.std(b) == 0:
        return math.nan
    return float(np.corrcoef(a, b)[0, 1])


__all__ = [
    "AHEAD",
    "FEATURES",
    "Fit",
    "carried_over",
    "difference",
    "fit",
    "fitted_on",
    "logistic",
    "signals",
]
