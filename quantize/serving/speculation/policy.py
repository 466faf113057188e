"""What a policy of speculation lengths is, and the plain ones.

A policy decides from what the draft computed and what the parent has judged so far, never from what
the parent would say next. A length so chosen is a stopping time of the draft, so that checking the
drafted tokens keeps the parent's distribution whatever the policy (Leviathan et al. 2023,
arXiv:2211.17192, algorithm 1 holds for each length).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

MOST = 20
"""Tokens that are drafted at most in one step where a policy knows no bound of its own; transformers'
own default."""


@dataclass(frozen=True)
class Signal:
    """What the draft's distribution was where it has just drafted a token, at the temperature."""

    entropy: float
    """In nats."""
    confidence: float
    """Probability of its likeliest token."""
    margin: float
    """That less the probability of the second."""


@dataclass(frozen=True)
class Round:
    """One step of speculative decoding, after the parent has checked it."""

    drafted: int
    accepted: int
    signals: Sequence[Signal] = ()
    """Of the drafted tokens, as far as they are known."""
    kl: Sequence[float] = ()
    """KL(parent ‖ draft) in nats at the drafted tokens, also behind a rejected one where they are
    known."""
    temperature: float = 0.0


class Speculation(Protocol):
    """The state of a policy for one sequence."""

    def length(self) -> int:
        """Most tokens to draft in the next step, at least 0."""
        ...

    def goes_on(self, signals: Sequence[Signal]) -> bool:
        """Whether to draft another token behind these of the step under way."""
        ...

    def learn(self, step: Round) -> None:
        """Take note of a step."""
        ...


class Policy(Protocol):
    """Makes the state of each new sequence."""

    @property
    def name(self) -> str:
        """What the policy is called on the command line and in reports."""
        ...

    def start(self) -> Speculation:
        """The state of a sequence that nothing is known of."""
        ...


class _Fixed:
    """The part of a state that most policies leave alone."""

    def __init__(self, length: int) -> None:
        self.current = length

    def length(self) -> int:
        return self.current

    def goes_on(self, signals: Sequence[Signal]) -> bool:
        return True

    def learn(self, step: Round) -> None:
        pass


@dataclass(frozen=True)
class Static:
    """The same length always."""

    gamma: int

    @property
    def name(self) -> str:
        """static-γ."""
        return f"static-{self.gamma}"

    def start(self) -> Speculation:
        """The state of a new sequence."""
        return _Fixed(self.gamma)


@dataclass(frozen=True)
class Heuristic:
    """transformers' `heuristic` schedule: two more where all were accepted, else one less, at
    least 1."""

    first: int = MOST
    name: str = field(default="heuristic", init=False)

    def start(self) -> Speculation:
        """The state of a new sequence."""
        return _HeuristicState(self.first)


class _HeuristicState(_Fixed):
    def learn(self, step: Round) -> None:
        if step.drafted and step.accepted == step.drafted:
            self.current += 2
        else:
            self.current = max(1, self.current - 1)


@dataclass(frozen=True)
class Confidence:
    """transformers' `assistant_confidence_threshold`: end behind a token whose probability is below
    it. transformers looks at the drafted token, here it is the likeliest: the same at T = 0."""

    threshold: float = 0.4
    most: int = MOST
    name: str = field(default="confidence", init=False)

    def start(self) -> Speculation:
        """The state of a new sequence."""
        return _ConfidenceState(self.most, self.threshold)


class _ConfidenceState(_Fixed):
    def __init__(self, most: int, threshold: float) -> None:
        super().__init__(most)
        self.threshold = threshold

    def goes_on(self, signals: Sequence[Signal]) -> bool:
        return signals[-1].confidence >= self.threshold


@dataclass(frozen=True)
class AdaEdl:
    """AdaEDL (Agrawal et al. 2024, arXiv:2410.18351): end behind a token where the lower bound of its
    acceptance, 1 − √(γ·H), is below λ; each sequence by itself.

    λ follows the share of tokens accepted as in Draft & Verify (Zhang et al. 2023, arXiv:2309.08168),
    whose rule the paper takes over: up by `step` where the running share is below `goal`, else down,
    smoothed.
    """

    scale: float = 0.2
    """γ in the bound."""
    first: float = 0.4
    """λ before anything was learnt."""
    goal: float = 0.9
    step: float = 0.01
    smooth_rate: float = 0.5
    smooth_threshold: float = 0.9
    most: int = MOST
    name: str = field(default="adaedl", init=False)

    def start(self) -> Speculation:
        """The state of a new sequence."""
        return _AdaEdlState(self)


class _AdaEdlState(_Fixed):
    def __init__(self, policy: AdaEdl) -> None:
        super().__init__(policy.most)
        self.policy, self.threshold, self.rate = policy, policy.first, policy.goal

    def goes_on(self, signals: Sequence[Signal]) -> bool:
        bound = 1 - math.sqrt(self.policy.scale * max(0.0, signals[-1].entropy))
        return bound >= self.threshold

    def learn(self, step: Round) -> None:
        if not step.drafted:
            return
        p = self.policy
        share = step.accepted / step.drafted
        self.rate = p.smooth_rate * self.rate + (1 - p.smooth_rate) * share
        moved = self.threshold + (p.step if self.rate < p.goal else -p.step)
        kept = p.smooth_threshold
        self.threshold = min(1.0, max(0.0, kept * self.threshold + (1 - kept) * moved))
