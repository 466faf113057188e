"""Tokens per step of the parent for every length, replayed on the parent's text.

A step drafts γ tokens; the parent accepts some and adds one of its own. Whether the token at position
t is accepted, given that it was drafted and is what the parent wrote, has probability a_t ('accept'
of a trace), independently of everything else. How often a step begins at t follows by recursion, so
that no dice are thrown: E[steps] = Σ_t P(a step begins at t).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval, prompts taken as the independent units."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def half(self) -> float | None:
        """Half the interval's width; None where one prompt is all there is."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


@dataclass(frozen=True)
class Counts:
    """What speculation costs and gives, summed over each text."""

    tokens: Array
    steps: Array
    """Calls of the parent, expected where they are not drawn."""
    drafted: Array
    """Calls of the draft, likewise."""

    @property
    def per_step(self) -> Interval:
        """Tokens per step."""
        return ratio(self.tokens, self.steps)

    @property
    def acceptance(self) -> Interval:
        """Accepted of all drafted tokens."""
        return ratio(self.tokens - self.steps, self.drafted)

    @property
    def drafted_per_step(self) -> float:
        """Calls of the draft in a mean step."""
        return float(self.drafted.sum() / self.steps.sum())


@dataclass(frozen=True)
class Replay(Counts):
    """Counts of one static length."""

    gamma: int


def replay(accept: Sequence[Array], gamma: int, from_prefill: bool = False) -> Replay:
    """Replay a static length on texts whose tokens are accepted with probability `accept`.

    The last steps draft no more than is left to write less the token that the parent adds, as
    transformers does. from_prefill: the first token comes from reading the prompt, without a draft
    (vLLM), and is not counted.
    """
    used = [values[1:] if from_prefill else values for values in accept]
    steps, drafted = (np.zeros(len(used)) for _ in range(2))
    for text, values in enumerate(used):
        steps[text], drafted[text] = _expected(values, gamma)
    return Replay(np.array([len(values) for values in used], float), steps, drafted, gamma)


def whole_steps(
    accept: Sequence[Array], gamma: int, from_prefill: bool = False
) -> tuple[Array, Array]:
    """Expected steps [n] of each text that draft all γ tokens, and how many of them accept at least
    their first 1, 2, … γ of these [n, γ].

    Engines that draft past the end of a text and count what they drafted (vLLM) do nothing but such
    steps: the figures of a text of T tokens are theirs for one of T − γ. from_prefill: see `replay`.
    """
    used = [values[1:] if from_prefill else values for values in accept]
    steps, reached = np.zeros(len(used)), np.zeros((len(used), gamma))
    for text, values in enumerate(used):
        a = values.tolist()
        begins = np.zeros(len(a) + gamma + 2)
        begins[0] = 1.0
        for t in range(len(a) - gamma):
            here = float(begins[t])
            steps[text] += here
            for k in range(gamma):
                begins[t + k + 1] += here * (1 - a[t + k])
                here *= a[t + k]
                reached[text, k] += here
            begins[t + gamma + 1] += here
    return steps, reached


def _expected(accept: Array, gamma: int) -> tuple[float, float]:
    T = len(accept)
    begins = np.zeros(T + gamma + 2)
    begins[0] = 1.0
    drafted = 0.0
    a = accept.tolist()
    for t in range(T):
        here = float(begins[t])
        if here == 0.0:
            continue
        k = min(gamma, T - t - 1)
        drafted += here * k
        for position in range(t, t + k):
            begins[position + 1] += here * (1 - a[position])
            here *= a[position]
        begins[t + k + 1] += here
    return float(begins[:T].sum()), drafted


def ratio(above: Array, below: Array) -> Interval:
    """Σ above / Σ below and its 95 % interval from the spread of the texts [n] (linearized, with
    Student's t for few texts)."""
    total = float(below.sum())
    if total <= 0:
        return Interval(math.nan)
    value = float(above.sum()) / total
    n = int((below > 0).sum())
    if n < 2:
        return Interval(value)
    spread = float(np.square(above - value * below).sum())
    half = _student(n - 1) * math.sqrt(n / (n - 1) * spread) / total
    return Interval(value, value - half, value + half)


def mean(values: Sequence[Array]) -> Interval:
    """Mean over tokens of a column, with the interval by text."""
    return ratio(
        np.array([float(v.sum()) for v in values]), np.array([float(len(v)) for v in values])
    )


def _student(freedom: int) -> float:
    """97.5 % quantile of Student's t: its expansion in 1/ν (Abramowitz and Stegun 26.7.5), exact
    values for the three where that is off by more than one in a hundred."""
    exact = {1: 12.706, 2: 4.303, 3: 3.182}
    if freedom in exact:
        return exact[freedom]
    z = 1.959964
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


def independent(alpha: float, gamma: int) -> float:
    """Tokens per step if every drafted token were accepted with probability α by itself:
    (1 − α^{γ+1}) / (1 − α) (Leviathan et al. 2023, equation 1)."""
    return gamma + 1.0 if alpha >= 1 else (1 - alpha ** (gamma + 1)) / (1 - alpha)
