"""The clock: requests come, engines take steps, those that share a GPU slow each other down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from quantize.plan.simulate.engine import Engine
from quantize.plan.simulate.memory import Memory
from quantize.plan.simulate.requests import Requests
from quantize.plan.simulate.setup import EngineSetup, Log
from quantize.plan.simulate.steps import IDLE

Row = tuple[float, int, int, int, float, float]
"""Values of SAMPLE."""
SAMPLE = np.dtype(
    [
        ("time", np.float64),
        ("engine", np.int64),
        ("running", np.int64),
        ("waiting", np.int64),
        ("used", np.float64),
        ("live", np.float64),
    ]
)
"""The state when an engine decided on its next steps. `used`: bytes or blocks of its memory, of slabs
those of all engines of its format; `live`: of these, what blocks of requests lie on."""


@dataclass(frozen=True)
class Outcome:
    """What became of each request; seconds, NaN where it did not happen."""

    requests: Requests
    first: NDArray[np.float64]
    """When its first token came."""
    finish: NDArray[np.float64]
    dropped: NDArray[np.bool_]
    preemptions: int
    recomputed: int
    """Tokens computed again after a preemption."""
    seconds: float
    """From the start to the last event."""
    busy: tuple[float, ...]
    """Seconds in which each engine computed."""
    rows: Sequence[Row] = field(default=(), repr=False)
    """Of `samples`."""
    preempted: tuple[int, ...] = ()
    """`preemptions` of each engine."""
    found: tuple[int, ...] = ()
    """Tokens of prompts that each engine took from its prefix cache."""

    @cached_property
    def samples(self) -> NDArray[np.void]:
        """States of the engines over time, SAMPLE each; none where they were not asked for."""
        return np.array(list(self.rows), dtype=SAMPLE)

    def samples_of(self, engine: int) -> NDArray[np.void]:
        """Those of one engine."""
        found: NDArray[np.void] = self.samples[self.samples["engine"] == engine]
        return found

    @property
    def ttft(self) -> NDArray[np.float64]:
        """From arrival to first token."""
        return self.first - self.requests.arrival

    @property
    def tpot(self) -> NDArray[np.float64]:
        """Mean gap between tokens after the first; 0 for answers of one token."""
        gaps = np.maximum(self.requests.output - 1, 1)
        return np.where(self.requests.output > 1, (self.finish - self.first) / gaps, 0.0)

    def met(
        self, ttft: float | NDArray[np.float64] = IDLE, tpot: float | NDArray[np.float64] = IDLE
    ) -> NDArray[np.bool_]:
        """Which requests were answered within both goals, one for all or one each; a dropped one
        was not."""
        with np.errstate(invalid="ignore"):
            return (self.ttft <= ttft) & (self.tpot <= tpot)

    @property
    def hit_rate(self) -> float:
        """Share of the tokens of answered prompts that prefix caches held."""
        admitted = ~self.dropped & ~np.isnan(self.first)
        every = int(self.requests.input[admitted].sum())
        return sum(self.found) / every if every else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Output tokens of answered requests over the whole time."""
        done = ~np.isnan(self.finish)
        return float(self.requests.output[done].sum() / self.seconds) if self.seconds else 0.0


def simulate(
    requests: Requests,
    engines: Sequence[tuple[EngineSetup, Memory]],
    until: float = IDLE,
    samples: bool = False,
) -> Outcome:
    """Serve requests, each by the engine of its model with the least to do.

    Equal arguments give equal results. until: stop the clock then, whatever is unanswered.
    samples: record the state at every decision. Requests of a model without an engine are dropped.
    """
    arrival, outputs = requests.arrival.tolist(), requests.output.tolist()
    inputs = requests.input.tolist()
    log = Log(len(arrival), len(engines))
    shared = (arrival, inputs, outputs, log)
    made = [Engine(setup, memory, *shared, i) for i, (setup, memory) in enumerate(engines)]
    clock = _Clock(made, requests, log, samples)
    seconds = clock.run(until)
    return Outcome(
        requests,
        np.array(log.first),
        np.array(log.finish),
        np.array(log.dropped),
        log.preempted,
        log.recomputed,
        seconds,
        tuple(engine.busy_seconds for engine in made),
        clock.rows,
        tuple(engine.preempted for engine in made),
        tuple(log.found),
    )


class _Clock:
    def __init__(self, engines: list[Engine], requests: Requests, log: Log, samples: bool) -> None:
        self.engines, self.log = engines, log
        self.arrival = requests.arrival.tolist()
        self.models = requests.model.tolist()
        self.serving: dict[int, list[int]] = {}
        for i, engine in enumerate(engines):
            self.serving.setdefault(engine.setup.model, []).append(i)
        self.ends = [IDLE] * len(engines)
        self.record, self.rows = samples, list[Row]()
        self.neighbours = [
            [
                j
                for j, other in enumerate(engines)
                if j != i and set(other.setup.gpus) & set(engine.setup.gpus)
            ]
            for i, engine in enumerate(engines)
        ]
        self.crowded = any(self.neighbours)
        self.on_gpu = {g: 0 for engine in engines for g in engine.setup.gpus}
        self.active = [False] * len(engines)
        most = {g: sum(g in e.setup.gpus for e in engines) for g in self.on_gpu}
        self.factors = [
            engine.costs.factors(max(most[g] for g in engine.setup.gpus)) for engine in engines
        ]
        pools = [{id(pool) for pool in engine.memory.pools} for engine in engines]
        self.same_pool = [
            [j for j, theirs in enumerate(pools) if j != i and theirs & own]
            for i, own in enumerate(pools)
        ]

    def run(self, until: float) -> float:
        arrival, models, ends, engines = self.arrival, self.models, self.ends, self.engines
        single = len(engines) == 1
        simple = not (self.crowded or self.record or any(self.same_pool))
        serving, load = self.serving, self.log.load
        count, i, now = len(arrival), 0, 0.0
        end = IDLE
        while True:
            due = arrival[i] if i < count else IDLE
            if due <= end:
                if due > until:
                    return until
                if due == IDLE:
                    return now
                now = due
                own = serving.get(models[i])
                if own is None:
                    self.log.dropped[i] = True
                else:
                    # The first with the least to do; quicker where all are of the model.
                    all_own = len(own) == len(load)
                    e = load.index(min(load)) if all_own else min(own, key=load.__getitem__)
                    engine = engines[e]
                    engine.put(i)
                    if engine.end == IDLE:
                        if simple:
                            engine.start(now)
                            ends[e] = engine.end
                        else:
                            self._start(e, now)
                            end = min(ends)
                    elif not engine.mixed:
                        engine.cut(now)
                        ends[e] = engine.end
                    if ends[e] < end:
                        end = ends[e]
                i += 1
            else:
                if end > until:
                    return until
                now = end
                e = 0 if single else ends.index(end)
                engine = engines[e]
                engine.finish()
                if simple:
                    engine.start(now)
                    ends[e] = engine.end
                else:
                    self._start(e, now)
                    if self.same_pool[e]:
                        self._wake(e, now)
                end = ends[0] if single else min(ends)

    def _start(self, e: int, now: float) -> None:
        """Let an engine decide on its next steps."""
        engine = self.engines[e]
        engine.start(now)
        if self.crowded:
            self._share(e, now)
        self.ends[e] = engine.end
        if self.record:
            waiting = len(engine.queue) + len(engine.resumed)
            used, live = engine.memory.held()
            self.rows.append((now, e, len(engine.running), waiting, used, live))

    def _wake(self, e: int, now: float) -> None:
        """Let those try again that had no memory, since an engine may have given some back."""
        for other in self.same_pool[e]:
            if self.engines[other].starved:
                self._start(other, now)

    def _share(self, e: int, now: float) -> None:
        """Slow an engine down by those on its GPUs, and them by it."""
        engine = self.engines[e]
        active = engine.end != IDLE
        changed = active != self.active[e]
        if changed:
            self.active[e] = active
            for gpu in engine.setup.gpus:
                self.on_gpu[gpu] += 1 if active else -1
        for i in (e, *self.neighbours[e]) if changed else (e,):
            other = self.engines[i]
            if self.active[i]:
                busy = max(self.on_gpu[gpu] for gpu in other.setup.gpus)
                other.share(now, self.factors[i][0 if other.mixed else 1][busy])
                self.ends[i] = other.end
