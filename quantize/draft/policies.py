"""Policies of speculation lengths on the parent's text, for one sequence and for batches.

Which tokens are accepted is drawn once for each text, so that all policies meet the same luck. What
is accepted is exact. What a policy is told of tokens behind a rejected one is not the draft's, which
would have gone on from its own token, but what stands there in the parent's text: that bears on how
many tokens are drafted in vain, not on how many are accepted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantize.draft.replay import Array, Counts, Interval, ratio
from quantize.draft.trace import Trace
from quantize.serving.speculation.dsde import DsdeState
from quantize.serving.speculation.policy import MOST, Policy, Round, Signal, Speculation


@dataclass(frozen=True)
class Story:
    """One text and which of its tokens are accepted where they are drafted."""

    text: int
    outcomes: NDArray[np.bool_]
    signals: tuple[Signal, ...]
    kl: tuple[float, ...]
    temperature: float


@dataclass(frozen=True)
class Costs:
    """Of one step, in plain steps of the parent with the same batch."""

    draft: float
    """Of each token that the slowest sequence drafts."""
    check: float = 1.0
    check_token: float = 0.0
    """Of each drafted token of a sequence in the mean, while it is checked."""

    def step(self, drafted: Sequence[int]) -> float:
        """Time of a step of sequences that draft so many tokens each."""
        return (
            self.check + self.check_token * sum(drafted) / len(drafted) + self.draft * max(drafted)
        )


def stories(trace: Trace, repeats: int = 1, seed: int = 0) -> list[Story]:
    """Draw the outcomes of a trace, `repeats` times where they are chances (T > 0)."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(repeats if trace.temperature > 0 else 1):
        for text, accept in enumerate(trace["accept"]):
            columns = (trace[name][text].tolist() for name in ("entropy", "confidence", "margin"))
            signals = tuple(Signal(*values) for values in zip(*columns, strict=True))
            outcomes = rng.random(len(accept)) < accept
            kl = tuple(trace["kl"][text].tolist())
            found.append(Story(text, outcomes, signals, kl, trace.temperature))
    return found


def take_step(state: Speculation, story: Story, at: int, cap: int | None = None) -> tuple[int, int]:
    """One step of a sequence of which `at` tokens are written → tokens drafted and accepted."""
    left = len(story.outcomes) - at
    most = min(state.length(), left - 1, left if cap is None else cap)
    drafted = 0
    while drafted < most:
        drafted += 1
        if drafted < most and not state.goes_on(story.signals[at : at + drafted]):
            break
    accepted = 0
    while accepted < drafted and story.outcomes[at + accepted]:
        accepted += 1
    judged = at + min(accepted + 1, drafted)
    state.learn(
        Round(
            drafted,
            accepted,
            story.signals[at:judged],
            story.kl[at:judged],
            story.temperature,
        )
    )
    return drafted, accepted


class Oracle:
    """Drafts exactly what will be accepted: what no policy can beat while c < 1."""

    name = "oracle"

    def __init__(self, story: Story, most: int = MOST) -> None:
        self.story, self.most, self.at = story, most, 0

    def length(self) -> int:
        """The run of accepted tokens ahead."""
        ahead = self.story.outcomes[self.at : self.at + self.most]
        return int(np.argmin(ahead)) if not ahead.all() else len(ahead)

    def goes_on(self, signals: Sequence[Signal]) -> bool:
        """Always: the length is right."""
        return True

    def learn(self, step: Round) -> None:
        """Move on."""
        self.at += step.accepted + 1


@dataclass(frozen=True)
class Outcome(Counts):
    """Counts of a policy on all stories, one sequence at a time."""

    name: str

    def time(self, costs: Costs) -> Array:
        """Of each text, in plain steps of the parent."""
        return costs.check * self.steps + (costs.draft + costs.check_token) * self.drafted

    def speed_up(self, costs: Costs) -> Interval:
        """Tokens for each plain step's time."""
        return ratio(self.tokens, self.time(costs))


def play(policy: Policy | None, told: Sequence[Story]) -> Outcome:
    """Run a policy, or the oracle for None, on every story."""
    texts = max(story.text for story in told) + 1
    tokens, steps, drafted = (np.zeros(texts) for _ in range(3))
    for story in told:
        state: Speculation = Oracle(story) if policy is None else policy.start()
        at = 0
        while at < len(story.outcomes):
            k, accepted = take_step(state, story, at)
            at += accepted + 1
            steps[story.text] += 1
            drafted[story.text] += k
        tokens[story.text] += len(story.outcomes)
    return Outcome(tokens, steps, drafted, Oracle.name if policy is None else policy.name)


@dataclass(frozen=True)
class BatchOutcome:
    """What a policy does in a batch whose sequences wait for one another."""

    name: str
    batch: int
    speed_up: float
    """Tokens in the time in which the parent alone would write one for each sequence, over one for
    each sequence."""
    tokens_per_step: float
    """Of one sequence."""
    drafted_per_step: float
    """Of one sequence in the mean."""
    longest: float
    """Tokens of the slowest sequence of a mean step: what the others wait for."""


def play_batch(
    policy: Policy | None,
    told: Sequence[Story],
    batch: int,
    costs: Costs,
    *,
    tokens: int = 20000,
    seed: int = 0,
) -> BatchOutcome:
    """Let `batch` sequences run in step, the next text in the place of one that ends, until about so
    many tokens are written.

    Each step takes as long as its longest draft. A policy that is `capped` (DSDE) drafts at most the
    mean of its sequences' lengths, rounded up.
    """
    rng = np.random.default_rng(seed)
    capped = bool(getattr(policy, "capped", False))

    def fresh() -> tuple[Story, Speculation, int]:
        story = told[int(rng.integers(len(told)))]
        state: Speculation = Oracle(story) if policy is None else policy.start()
        return story, state, 0

    # begun at different places, as in an engine that has run for long
    slots = [fresh() for _ in range(batch)]
    time = written = steps = drafted = longest = 0.0
    while written < tokens:
        cap = _cap([state for _, state, _ in slots]) if capped else None
        done = [take_step(state, story, at, cap) for story, state, at in slots]
        lengths = [k for k, _ in done]
        time += costs.step(lengths)
        steps += 1
        drafted += sum(lengths)
        longest += max(lengths)
        for slot, (_, accepted) in enumerate(done):
            story, state, at = slots[slot]
            written += accepted + 1
            at += accepted + 1
            slots[slot] = (story, state, at) if at < len(story.outcomes) else fresh()
    name = Oracle.name if policy is None else policy.name
    per = steps * batch
    return BatchOutcome(
        name, batch, written / batch / time, written / per, drafted / per, longest / steps
    )


def _cap(states: Sequence[Speculation]) -> int | None:
    """⌈mean length⌉ of the sequences whose lengths are adapted already; None without any."""
    lengths = [s.length() for s in states if isinstance(s, DsdeState) and s.bounds is not None]
    return math.ceil(sum(lengths) / len(lengths)) if lengths else None
