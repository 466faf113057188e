"""The figures of one draft on one rollout; field names are the keys of `pq draft --json`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from quantize.draft.replay import Interval, Replay, independent, mean, replay
from quantize.draft.trace import Array, Trace, perplexity

GAMMAS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16)
"""Lengths that are replayed."""
_BINS = 16
"""Stretches of the written text in the curve by position."""
_WORST = 12
"""Places that are shown: as many as a person reads."""
_BEFORE, _AFTER = 32, 8
"""Tokens of context around one of them: a line or two."""


@dataclass(frozen=True)
class Length:
    """What one γ gives."""

    gamma: int
    tokens_per_step: Interval
    acceptance: Interval
    """Of drafted tokens; falls with γ, since what stands behind a rejected token is lost."""
    drafted_per_step: float
    independent: float | None
    """Tokens per step if acceptance were α at each token by itself."""


@dataclass(frozen=True)
class Domain:
    """One data set's part."""

    name: str
    texts: int
    tokens: int
    alpha: Interval | None
    kl: Interval | None
    lengths: tuple[Length, ...]


@dataclass(frozen=True)
class Sampling:
    """One draft at one temperature."""

    temperature: float
    """0: greedy."""
    texts: int
    tokens: int
    alpha: Interval | None
    """Chance that a drafted token is accepted; at T = 0 the share of likeliest tokens that agree with
    the text. None for prompt lookup, as all that needs the draft's distribution."""
    kl: Interval | None
    """KL(parent ‖ draft), nats per token; at T = 0 taken at T = 1."""
    top1: Interval | None
    parent_perplexity: float | None
    """On its own text."""
    lengths: tuple[Length, ...]
    domains: tuple[Domain, ...]
    by_position: dict[str, Any] = field(default_factory=dict, repr=False)
    """start, alpha, kl: means over stretches of the written text."""
    worst: tuple[dict[str, Any], ...] = field(default=(), repr=False)
    """Tokens of the largest divergence in context."""

    def length(self, gamma: int) -> Length:
        """What this γ gives."""
        return next(found for found in self.lengths if found.gamma == gamma)


def length_of(found: Replay, alpha: float | None) -> Length:
    """Figures of a replay."""
    return Length(
        found.gamma,
        found.per_step,
        found.acceptance,
        found.drafted_per_step,
        None if alpha is None else independent(alpha, found.gamma),
    )


def sampling_of(trace: Trace, tokenizer: Any = None, gammas: Sequence[int] = GAMMAS) -> Sampling:
    """Figures of one trace. tokenizer: writes the worst places; None leaves them out."""
    alpha, kl = _alpha(trace), mean(trace["kl"])
    return Sampling(
        trace.temperature,
        len(trace["kl"]),
        trace.rollout.count,
        alpha,
        kl,
        mean(trace["top1"]),
        perplexity(trace["nll"]),
        tuple(length_of(replay(trace["accept"], g), alpha.value) for g in gammas),
        tuple(_domains(trace, gammas)),
        _by_position(trace),
        () if tokenizer is None else tuple(_worst(trace, tokenizer)),
    )


def chance(trace: Trace) -> list[Array]:
    """The chance of acceptance at each token: at T = 0 whether the likeliest tokens agree, above it
    Σ min(p, q), which scatters less than what became of the one token that was drawn."""
    return trace["accept"] if trace.temperature == 0 else trace["overlap"]


def _alpha(trace: Trace) -> Interval:
    return mean(chance(trace))


def _domains(trace: Trace, gammas: Sequence[int]) -> list[Domain]:
    names = [prompt.domain for prompt in trace.rollout.prompts]
    found = []
    for name in dict.fromkeys(names):
        part = trace.only([i for i, n in enumerate(names) if n == name])
        alpha = _alpha(part)
        lengths = tuple(length_of(replay(part["accept"], g), alpha.value) for g in gammas)
        found.append(
            Domain(
                name,
                len(part["kl"]),
                part.rollout.count,
                alpha,
                mean(part["kl"]),
                lengths,
            )
        )
    return found


def _by_position(trace: Trace) -> dict[str, Any]:
    longest = max(map(len, trace["kl"]))
    width = max(1, -(-longest // _BINS))
    starts = list(range(0, longest, width))

    def curve(values: Sequence[Array]) -> list[float]:
        return [float(np.concatenate([v[at : at + width] for v in values]).mean()) for at in starts]

    return {"start": starts, "alpha": curve(chance(trace)), "kl": curve(trace["kl"])}


def _worst(trace: Trace, tokenizer: Any) -> list[dict[str, Any]]:
    places = [
        (float(value), text, at)
        for text, values in enumerate(trace["kl"])
        for at, value in enumerate(values)
    ]
    places.sort(reverse=True)
    return [_in_context(trace, text, at, tokenizer) for _, text, at in places[:_WORST]]


def _in_context(trace: Trace, text: int, at: int, tokenizer: Any) -> dict[str, Any]:
    prompt, written = trace.rollout.prompts[text], trace.rollout.tokens[text]
    before = [*prompt.ids, *written[:at]]

    def said(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    return {
        "domain": prompt.domain,
        "text": text,
        "position": at,
        "before": said(before[-_BEFORE:]),
        "token": said(written[at : at + 1]),
        "after": said(written[at + 1 : at + 1 + _AFTER]),
        "draft_choice": said([int(trace.choice[text][at])]),
        "parent_choice": said([int(trace.parent_choice[text][at])]),
        "kl": float(trace["kl"][text][at]),
        "accept": float(trace["accept"][text][at]),
        "probability": math.exp(-float(trace["draft_nll"][text][at])),
        "parent_probability": math.exp(-float(trace["nll"][text][at])),
    }
