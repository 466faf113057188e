"""How many engines of a given width one model needs for what is asked of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from quantize.plan.gpus import Gpu
from quantize.plan.latency import CONSTANTS, Batch, Constants, StepTime, first_token_seconds
from quantize.plan.memory import Engine, Fit, engine_for, fit
from quantize.plan.request import Demand
from quantize.plan.served import ServedModel
from quantize.plan.simulate.requests import Requests
from quantize.plan.simulated import Simulated, simulate_engines
from quantize.plan.steady import Limits, Load, Steady, best_rate, binding, steady


@dataclass(frozen=True)
class Option:
    """One way to run one model: engines of `tp` GPUs of one kind."""

    model: ServedModel
    demand: Demand
    gpu: Gpu
    tp: int
    engine: Engine
    fit: Fit
    refused: str | None = None
    """Why no engine runs so, whatever the goals; None where one does."""
    rate: float | None = None
    """Requests a second that one engine takes within the goals, by the closed form; None where no
    rate is asked for."""
    replicas: int = 0
    """Engines that all of it takes; 0 where no number of them meets the goals."""
    wanted: int = 0
    """Engines that it takes at least, also where there is room for fewer."""
    state: Steady | None = None
    """Of each engine at its share of the rate."""
    binds: str = "memory"
    """What one engine has too little of to take more: memory, sequences, compute, ttft or tpot."""
    simulated: Simulated | None = None
    """What the simulator made of that many engines."""
    constants: Constants = CONSTANTS
    load: Load | None = None
    """All of what is asked, where that is a rate or a trace."""

    @property
    def gpus(self) -> int:
        """GPUs of all engines."""
        return self.tp * self.replicas

    @property
    def step(self) -> StepTime:
        """How long its steps take."""
        return StepTime(self.model, self.gpu, self.tp, self.constants)

    @property
    def alone(self) -> float:
        """TPOT of one sequence that has the engine to itself, in seconds."""
        return self.step.seconds(Batch(0, 0.0, 1, self.demand.input))

    @property
    def first(self) -> float:
        """TTFT of one prompt that has the engine to itself, in seconds."""
        left, done, total = self.demand.input, 0, 0.0
        while left > 0:
            n = min(left, self.engine.batched_tokens)
            total += self.step.seconds(Batch(n, done + n / 2))
            done, left = done + n, left - n
        return total + first_token_seconds(self.model, self.constants)

    @property
    def together(self) -> int:
        """Sequences of the full context that one engine runs at once."""
        return min(self.fit.sequences, self.engine.max_sequences)

    @property
    def works(self) -> bool:
        """Whether it meets all that is asked."""
        return self.refused is None and self.replicas > 0


def option_for(
    demand: Demand,
    model: ServedModel,
    gpu: Gpu,
    tp: int,
    constants: Constants = CONSTANTS,
    stream: Requests | None = None,
) -> Option:
    """One model on engines of `tp` GPUs: what fits, what one takes, how many are needed by the closed
    form.

    stream: requests of a rate or a trace, for their lengths.
    """
    engine = replace(engine_for(gpu), utilization=demand.utilization)
    longest = demand.longest
    if stream is not None and demand.context is None:
        longest = max(longest, int((stream.input + stream.output).max()))
    found = fit(model, gpu, tp, engine, longest)
    base = Option(model, demand, gpu, tp, engine, found, constants=constants)
    if refused := model.refuses(tp) or _too_large(model, found):
        return replace(base, refused=refused)
    if demand.sequences is not None:
        return _for_sequences(base, demand.sequences)
    if demand.rate is None and demand.trace is None:
        return replace(base, replicas=1, wanted=1)
    return _for_rate(base, stream)


def _too_large(model: ServedModel, found: Fit) -> str | None:
    """Why memory does not do for even one sequence."""
    if model.max_context is not None and found.context > model.max_context:
        return f"the model ends at {model.max_context:,} tokens, not {found.context:,}"
    if not found.memory.fits:
        return f"weights and engine exceed a GPU's memory by {-found.memory.kv / 1e9:.1f} GB"
    if found.sequences < 1:
        return f"no room for one sequence of {found.context:,} tokens"
    return None


def _for_sequences(base: Option, wanted: int) -> Option:
    """Engines for so many sequences at once, as many on each as fit and meet the goal of TPOT."""
    each, binds = base.fit.sequences, "memory"
    if each >= base.engine.max_sequences:
        each, binds = base.engine.max_sequences, "sequences"
    goal = base.demand.tpot
    if goal is not None and tpot_at(base, each) > goal:
        low, high = 0, each
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if tpot_at(base, middle) <= goal else (low, middle)
        each, binds = low, "tpot"
    replicas = math.ceil(wanted / each) if each else 0
    return replace(base, replicas=replicas, wanted=replicas, binds=binds)


def tpot_at(option: Option, sequences: int) -> float:
    """Seconds of a step in which so many sequences of the full context get their next token."""
    n = max(1, sequences)
    return option.step.seconds(Batch(0, 0.0, n, n * option.fit.context))


def _for_rate(base: Option, stream: Requests | None) -> Option:
    demand, engine = base.demand, base.engine
    rate, inputs, outputs = demand.rate or 0.0, demand.input, demand.output
    if demand.trace is not None and stream is not None:
        rate = stream.rate
        inputs, outputs = round(stream.input.mean()), round(stream.output.mean())
    load = Load(rate, inputs, max(1, outputs), demand.attainment)
    sequences = min(engine.max_sequences, base.fit.blocks.sequences(load.context))
    limits = Limits(sequences, demand.ttft, demand.tpot)
    each = best_rate(base.step, engine, load, limits, max(rate, 1e-3) * 64)
    if not each:
        idle = replace(load, rate=0.0)
        return replace(base, rate=0.0, binds=binding(base.step, engine, idle, limits))
    replicas = max(1, math.ceil(rate / each - 1e-3))
    binds = binding(base.step, engine, replace(load, rate=each), limits)
    share = replace(load, rate=rate / replicas)
    return replace(
        base,
        rate=each,
        binds=binds,
        wanted=replicas,
        replicas=replicas,
        state=steady(base.step, engine, share),
        load=load,
    )


def with_simulation(option: Option, stream: Requests, most: int) -> Option:
    """The option with as many engines as the simulator finds are needed for a stream: `most` at
    most, which are those that there could be room for. None where they do not do."""
    simulated, replicas = _fewest(option, stream, min(option.wanted, most), most)
    wanted = replicas or max(option.wanted, most + 1)
    found = replace(option, simulated=simulated, replicas=replicas, wanted=wanted, state=None)
    if not replicas or option.load is None:
        return found
    share = replace(option.load, rate=option.load.rate / replicas)
    return replace(found, state=steady(option.step, option.engine, share))


def _fewest(base: Option, stream: Requests, start: int, most: int) -> tuple[Simulated | None, int]:
    """The fewest engines with which enough requests meet the goals in the simulator, looked for from
    what the closed form says; 0 engines where `most` do not do, with what became of those."""

    def run(replicas: int) -> Simulated:
        return simulate_engines(
            base.step, base.engine, base.fit.blocks, stream, base.demand, replicas
        )

    def does(found: Simulated) -> bool:
        return found.attainment >= base.demand.attainment

    now, best = start, run(start)
    if does(best):
        while now > 1 and does(fewer := run(now - 1)):
            now, best = now - 1, fewer
        return best, now
    low = now
    while not does(best):
        if now >= most:
            return best, 0
        low, now = now, min(most, now * 2 if now > 4 else now + 1)
        best = run(now)
    while now - low > 1:
        middle = (low + now) // 2
        if does(found := run(middle)):
            now, best = middle, found
        else:
            low = middle
    return best, now
