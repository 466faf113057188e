"""A policy fitted to one draft and parent: go on while another token is worth its cost.

Behind k drafted tokens, the next one is wanted if all of them and it are accepted; it costs c steps of
the parent. With âᵢ the chance of acceptance that the draft's own distribution foretells, and ā its
mean, drafting goes on while Π âᵢ · ā ≥ c · R, where R is tokens per unit of time: the rule that is
best where chances are as foretold and steps follow one another for long (renewal reward).
`quantize.draft.fit` fits it, and offers it where it beats the best static length on text that it was
not fitted on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from quantize.serving.speculation.policy import MOST, Round, Signal, Speculation

FEATURES = ("constant", "log_odds", "entropy", "margin", "running")
"""What acceptance is foretold by: 1; log-odds of the draft's likeliest token; entropy of its
distribution; margin over the second; running share of accepted tokens."""
KEEP = 0.95
"""Weight of what was before in the running share: about twenty tokens."""
_EDGE = 1e-4
"""Probabilities nearer to 0 or 1 count as this near: log-odds stay within ±9.2."""


def features_of(signal: Signal, running: float) -> tuple[float, ...]:
    """Values of FEATURES."""
    p = min(1 - _EDGE, max(_EDGE, signal.confidence))
    return (1.0, math.log(p / (1 - p)), signal.entropy, signal.margin, running)


@dataclass(frozen=True)
class Fitted:
    """The policy and what it was fitted for."""

    weights: tuple[float, ...]
    """Of FEATURES, in the log-odds of acceptance."""
    cost: float
    """A step of the draft over one of the parent."""
    rate: float
    """Tokens per step of the parent's time that replay reached on the text fitted on."""
    mean: float
    """Acceptance of a token in the mean."""
    most: int = MOST
    name: str = "fitted"

    def start(self) -> Speculation:
        """The state of a new sequence."""
        return _State(self)

    def chance(self, signal: Signal, running: float) -> float:
        """Foretold chance of acceptance."""
        values = features_of(signal, running)
        score = sum(w * v for w, v in zip(self.weights, values, strict=True))
        return 1 / (1 + math.exp(-max(-30.0, min(30.0, score))))

    def to_json(self) -> str:
        """The policy as a file's text."""
        return json.dumps(asdict(self) | {"features": list(FEATURES)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> Fitted:
        """The policy of a file's JSON; ValueError for another form."""
        if tuple(facts.get("features", ())) != FEATURES:
            raise ValueError(f"features must be {', '.join(FEATURES)}")
        try:
            weights = tuple(float(w) for w in facts["weights"])
            numbers = [float(facts[name]) for name in ("cost", "rate", "mean")]
            most = int(facts["most"])
        except (KeyError, TypeError) as err:
            raise ValueError(f"{err} is missing or no number") from None
        if len(weights) != len(FEATURES) or most < 1:
            raise ValueError(f"{len(FEATURES)} weights and most ≥ 1 are needed")
        return cls(weights, numbers[0], numbers[1], numbers[2], most)


class _State:
    def __init__(self, policy: Fitted) -> None:
        self.policy = policy
        self.running = policy.mean

    def length(self) -> int:
        # the first token is worth it wherever drafting is at all
        p = self.policy
        return p.most if p.mean >= p.cost * p.rate else 0

    def goes_on(self, signals: Sequence[Signal]) -> bool:
        p = self.policy
        all_accepted = math.prod(p.chance(signal, self.running) for signal in signals)
        return all_accepted * p.mean >= p.cost * p.rate

    def learn(self, step: Round) -> None:
        judged = [1.0] * step.accepted + [0.0] * (step.accepted < step.drafted)
        for value in judged:
            self.running = KEEP * self.running + (1 - KEEP) * value
