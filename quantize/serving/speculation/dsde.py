"""DSDE: lengths from how steadily the draft diverges from its parent.

With K the mean KL(parent ‖ draft) of the last step, SF = e^{2K} − 1 (K divided by the temperature
above 0) and WVIR the ratio of weighted variances of the KL values in a short and in a long window,
the next length is ⌈(1 − SF·WVIR)·(max − min) + min⌉ where SF·WVIR ≤ 1, else min. During a warm-up the
length doubles where all drafted tokens were accepted; what was accepted and diverged then sets min
and max.

Source: the DSDE paper, and github.com/samsungsds-research-paper/DSDE at 283f72f,
`vllm/spec_decode/dynamic_scheduler.py`. They differ, so there are two presets:

| | paper | published-code |
|---|---|---|
| windows of KL values | 10 and 30 | a third of what is there, and all, at most 100 |
| weight of a value n steps back | .85ⁿ | .9ⁿ |
| smallest length | 2 | 6 |
| largest | accepted · (1 + mean/max KL) | accepted · (1 + ½·mean/max KL) |
| cap of a batch at ⌈mean length⌉ | yes | no |
| KL values before lengths are adapted | 30 | 30 (the worker's fallback; its configuration says 100) |

Deviations: KL values are exact, where the code clamps probabilities at 1e-8; behind a rejected token
they are used only where they are known (`after_rejection`), which is in transformers but not in
replay, whose text is the parent's; and T = 0 is greedy here, so that text is the parent's.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from quantize.serving.speculation.policy import MOST, Round, Signal, Speculation

_FLAT = 1e-6
"""Variance of the long window below which the ratio says nothing."""
_FLAT_RATIO = 20.0
"""The ratio that stands for it in the code: drafting falls to the least."""
_STRENGTH = 2.0
"""Of K in SF."""


@dataclass(frozen=True)
class Dsde:
    """The policy with its constants."""

    name: str
    short: int | None
    """KL values of the short window; None: a third of those there are."""
    long: int
    decay: float
    least: int
    headroom: float
    """Of the mean over the largest KL value of the warm-up, in the largest length."""
    capped: bool
    """Whether a batch's lengths are capped at their mean."""
    most: int = MOST
    warm_up: int = 30
    """KL values before lengths are adapted."""
    after_rejection: bool = False
    """Whether values behind a rejected token count."""

    def start(self) -> Speculation:
        """The state of a new sequence."""
        return DsdeState(self)


PAPER = Dsde("dsde-paper", 10, 30, 0.85, 2, 1.0, True)
PUBLISHED_CODE = Dsde("dsde-published-code", None, 100, 0.9, 6, 0.5, False, after_rejection=True)


class DsdeState:
    """What is known of one sequence."""

    def __init__(self, policy: Dsde) -> None:
        self.policy = policy
        self.values: deque[float] = deque(maxlen=policy.long)
        self.seen = 0
        self.current = policy.least
        self.bounds: tuple[int, int] | None = None
        self.accepted_most = 0
        self.warm: list[float] = []

    def length(self) -> int:
        """Tokens to draft next."""
        return self.current

    def goes_on(self, signals: Sequence[Signal]) -> bool:
        """Always: the length is settled before a step."""
        return True

    def learn(self, step: Round) -> None:
        """Settle the next length by a step."""
        p = self.policy
        values = list(step.kl) if p.after_rejection else list(step.kl)[: step.accepted + 1]
        if not values:
            return
        self.values.extend(values)
        self.seen += len(values)
        if self.bounds is None:
            self.accepted_most = max(self.accepted_most, step.accepted)
            self.warm += values
            if self.seen < p.warm_up:
                if step.accepted >= self.current:
                    self.current = min(max(1, 2 * self.current), p.most)
                return
            self.bounds = self._bounds()
        self.current = self._next(sum(values) / len(values), step.temperature)

    def _bounds(self) -> tuple[int, int]:
        p = self.policy
        largest = max(self.warm) or 1.0
        mean = sum(self.warm) / len(self.warm)
        top = round(self.accepted_most * (1 + p.headroom * mean / largest))
        top = min(p.most, max(p.least, top))
        return min(top, max(p.least, math.ceil(0.1 * top))), top

    def _next(self, mean: float, temperature: float) -> int:
        assert self.bounds is not None
        low, high = self.bounds
        strength = _STRENGTH * (mean / temperature if temperature > 0 else mean)
        # e^700 is the largest there is
        damped = math.expm1(min(strength, 700.0)) * stability(self.values, self.policy)
        if damped > 1:
            return low
        return max(low, math.ceil((1 - damped) * (high - low) + low))


def stability(values: Sequence[float], policy: Dsde) -> float:
    """WVIR of KL values, oldest first: large where the last ones scatter more than the others."""
    every = list(values)[-policy.long :]
    if len(every) < 2:
        return 0.0
    short = policy.short or max(1, len(every) // 3)
    whole = _variance(every, policy.decay)
    return _FLAT_RATIO if whole < _FLAT else _variance(every[-short:], policy.decay) / whole


def _variance(values: Sequence[float], decay: float) -> float:
    weights = [decay**age for age in range(len(values) - 1, -1, -1)]
    total = sum(weights)
    mean = sum(w * v for w, v in zip(weights, values, strict=True)) / total
    return sum(w * (v - mean) ** 2 for w, v in zip(weights, values, strict=True)) / total
