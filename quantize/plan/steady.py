"""What a steady stream of requests makes of one engine: running sequences, TTFT, TPOT, its limits.

A closed form for the mean of vLLM's loop: prompts arrive at random (Poisson), each takes a step (or
several) together with all running sequences, and between those run steps that decode alone. By
Little's law as many run as arrive while one is answered. A trace, or several models that share
GPUs, is the simulator's business.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from quantize.plan.latency import Batch, StepTime, first_token_seconds
from quantize.plan.memory import Engine

_SPREAD = 1.65
"""Standard deviations of the number of running sequences that must fit, so that one time in twenty
some must wait or be computed anew."""
_ROUNDS = 200


@dataclass(frozen=True)
class Load:
    """Requests of one kind."""

    rate: float
    """A second, of one engine."""
    inputs: int
    """Tokens of a prompt."""
    outputs: int
    """Tokens of an answer."""
    share: float = 0.9
    """Of requests that a TTFT is stated for."""

    @property
    def context(self) -> int:
        """Tokens that a running sequence holds in the mean."""
        return self.inputs + max(1, self.outputs // 2)


@dataclass(frozen=True)
class Steady:
    """The state that a load settles in; times in seconds."""

    running: float
    """Sequences, in the mean."""
    ttft: float
    """Mean."""
    ttft_share: float
    """What that share of requests stays below."""
    tpot: float
    busy: float
    """Share of time in steps that hold a prompt."""


@dataclass(frozen=True)
class Limits:
    """What one engine can hold, and what is wanted of it; None: nothing is."""

    sequences: int
    """That fit at the mean context, and that the engine takes."""
    ttft: float | None = None
    tpot: float | None = None


def steady(step: StepTime, engine: Engine, load: Load) -> Steady | None:
    """The state of an engine under a load; None where prompts alone come faster than they are
    computed."""
    chunks = math.ceil(load.inputs / max(1, engine.batched_tokens))
    tokens = math.ceil(load.inputs / chunks)

    def times(running: float) -> tuple[float, float]:
        whole = round(running)
        batch = Batch(tokens, load.inputs / 2, whole, whole * load.context)
        alone = Batch(0, 0.0, max(1, whole), max(1, whole) * load.context)
        return step.seconds(batch), step.seconds(alone)

    running = 0.0
    for _ in range(_ROUNDS):
        mixed, alone = times(running)
        busy = load.rate * chunks * mixed
        if busy >= 1:
            return None
        per_second = load.rate * chunks + (1 - busy) / alone
        found = load.rate * max(0, load.outputs - 1) / per_second
        if abs(found - running) < 0.01 + 1e-4 * running:
            break
        running = found
    waits = busy * mixed / (2 * (1 - busy))
    own = (1 - busy) * alone / 2 + chunks * mixed + first_token_seconds(step.model, step.constants)
    tail = 0.0
    if busy > 1 - load.share:  # of those who wait: P(W > t) ≈ busy·exp(−t·busy / mean wait)
        tail = waits / busy * math.log(busy / (1 - load.share))
    return Steady(running, own + waits, own + max(tail, waits), 1 / per_second, busy)


def holds(found: Steady | None, limits: Limits) -> bool:
    """Whether a state fits memory and meets the goals, in the mid of its range."""
    if found is None or found.running + _SPREAD * math.sqrt(found.running) > limits.sequences:
        return False
    late = limits.ttft is not None and found.ttft_share > limits.ttft
    slow = limits.tpot is not None and found.tpot > limits.tpot
    return not (late or slow)


def best_rate(
    step: StepTime, engine: Engine, load: Load, limits: Limits, most: float = 1e4
) -> float:
    """Requests a second at most that one engine takes within its limits, to a part in a thousand;
    0 where it meets them for none. load: its own rate is not looked at."""

    def works(rate: float) -> bool:
        one = Load(rate, load.inputs, load.outputs, load.share)
        return holds(steady(step, engine, one), limits)

    low, high = 0.0, 1e-3
    if not works(high):
        return 0.0
    while high < most and works(high):
        low, high = high, high * 2
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if works(middle) else (low, middle)
    return low


def binding(step: StepTime, engine: Engine, load: Load, limits: Limits) -> str:
    """What stops an engine a little above the load it takes: memory, ttft, tpot or compute."""
    above = Load(load.rate * 1.02 + 1e-3, load.inputs, load.outputs, load.share)
    found = steady(step, engine, above)
    if found is None:
        return "compute"
    if found.running + _SPREAD * math.sqrt(found.running) > limits.sequences:
        return "memory" if limits.sequences < engine.max_sequences else "sequences"
    if limits.tpot is not None and found.tpot > limits.tpot:
        return "tpot"
    if limits.ttft is not None and found.ttft_share > limits.ttft:
        return "ttft"
    return "rate"
