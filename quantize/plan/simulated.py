"""Engines of one model under a stream of requests, by the simulator: who met the goals, and when not."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from quantize.errors import UsageError
from quantize.plan.latency import StepTime
from quantize.plan.memory import Blocks, Engine
from quantize.plan.request import Demand
from quantize.plan.simulate.costs import costs_of
from quantize.plan.simulate.memory import Share
from quantize.plan.simulate.prefixes import Cached, Chains, chains
from quantize.plan.simulate.requests import Requests, poisson, requests
from quantize.plan.simulate.run import Outcome, simulate
from quantize.plan.simulate.setup import EngineSetup

_COUNT = 2000
"""Requests that are drawn for a rate: a share of 90 % is then known to one percent."""
QUANTILES = (0.5, 0.9, 0.99)


@dataclass(frozen=True)
class Simulated:
    """What came of a stream of requests on equal engines; times in seconds."""

    attainment: float
    """Share of requests that met all goals."""
    ttft: tuple[float, ...]
    """At QUANTILES, of those answered."""
    tpot: tuple[float, ...]
    tokens_per_second: float
    preemptions: int
    busy: float
    """Share of the time in which the engines computed, in the mean over them."""
    outcome: Outcome


def stream_of(demand: Demand, seed: int = 0) -> Requests | None:
    """Requests as a demand has them, prompts and answers no longer than it allows; None where it
    names neither a rate nor a trace. UsageError for a trace that cannot be read."""
    if demand.trace is not None:
        found = requests(demand.trace, seed)
    elif demand.rate is not None:
        draw = np.random.default_rng(seed)
        found = poisson(demand.rate, _COUNT, draw, demand.input, demand.output, demand.spread)
    else:
        return None
    return clipped(found, demand)


def clipped(found: Requests, demand: Demand) -> Requests:
    """Requests no longer than a demand's context. UsageError for a trace that has longer ones."""
    longest = demand.context
    if longest is None:
        return found
    long = int((found.input + found.output > longest).sum())
    if demand.trace is not None and long:
        most = int((found.input + found.output).max())
        raise UsageError(
            f"trace {demand.trace}: {long:,} of {len(found):,} requests are longer than the context "
            f"of {longest:,} tokens; set context to {most:,}, or leave those out of the file"
        )
    inputs = np.minimum(found.input, longest - 1)
    outputs = np.minimum(found.output, longest - inputs)
    return replace(found, input=inputs, output=outputs)


def share_of(blocks: Blocks, context: int) -> Share:
    """The memory of one engine: blocks of layers that attend to all, and as `extra` what those with
    a window take beside them."""
    full = sum(groups for window, groups in blocks.groups if window is None)
    fixed = blocks.of(context) - full * math.ceil(context / blocks.block)
    if not full:  # nothing grows: what a sequence takes does not depend on its length
        return Share(blocks.count, max(1, context), math.ceil(fixed) - 1)
    return Share(blocks.count // full, blocks.block, math.ceil(fixed / full))


def own_memory(share: Share, chained: Chains | None) -> Share:
    """Memory like `share` for one engine more; with a prefix cache where chains are given."""
    if chained is None:
        return Share(share.blocks, share.block_tokens, share.extra)
    return Cached(share.blocks, chained, share.block_tokens, share.extra)


def simulate_engines(
    step: StepTime,
    engine: Engine,
    blocks: Blocks,
    stream: Requests,
    demand: Demand,
    replicas: int,
    samples: bool = False,
) -> Simulated:
    """Serve a stream by `replicas` engines that each have their GPUs to themselves. samples: record
    their states over time."""
    costs = costs_of(step)
    context = int((stream.input + stream.output).mean())
    share = share_of(blocks, context)
    chained = None
    if demand.prefix_cache and stream.prefix.any():
        chained = chains(stream, share.block_tokens)
    made = [
        (
            EngineSetup(
                costs,
                gpus=tuple(range(i * step.tp, (i + 1) * step.tp)),
                batched_tokens=engine.batched_tokens,
                sequences=engine.max_sequences,
            ),
            own_memory(share, chained),
        )
        for i in range(replicas)
    ]
    return judged(simulate(stream, made, samples=samples), demand)


def judged(outcome: Outcome, demand: Demand) -> Simulated:
    """What an outcome is worth to a demand."""
    met = outcome.met(demand.ttft or math.inf, demand.tpot or math.inf)
    done = ~np.isnan(outcome.finish)
    ttft, tpot = outcome.ttft[done], outcome.tpot[done]
    none = (math.nan,) * len(QUANTILES)
    return Simulated(
        attainment=float(met.mean()),
        ttft=tuple(float(q) for q in np.quantile(ttft, QUANTILES)) if len(ttft) else none,
        tpot=tuple(float(q) for q in np.quantile(tpot, QUANTILES)) if len(tpot) else none,
        tokens_per_second=outcome.tokens_per_second,
        preemptions=outcome.preemptions,
        busy=float(np.mean(outcome.busy)) / outcome.seconds if outcome.seconds else 0.0,
        outcome=outcome,
    )
