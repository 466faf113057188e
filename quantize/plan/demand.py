"""What a model asks of a cluster at a given number of GPUs: memory, batch, and how busy it keeps them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quantize.plan.simulate.costs import StepCosts
from quantize.plan.slabs import KvFormat

SIZES = (1, 2, 4, 8)
"""GPUs of one replica."""
_BATCHES = (*range(1, 17), *(round(16 * 1.125**k) for k in range(1, 48)))
"""Batches that are looked at: each up to 16, then every eighth part more, up to 4,000."""


@dataclass(frozen=True)
class Shard:
    """A model over `tp` GPUs; bytes are of one of them."""

    tp: int
    weights: int
    kind: KvFormat
    costs: StepCosts


@dataclass(frozen=True)
class Option:
    """A way to serve a demand: `dp` replicas of `shard.tp` GPUs."""

    shard: Shard
    dp: int
    batch: int
    """Sequences that a replica runs at once to keep up with its rate."""
    most: int
    """Sequences that goal and memory allow it."""
    load: float
    """Rate over what a replica answers with `most` sequences: below 1 it keeps up."""

    @property
    def gpus(self) -> int:
        """GPUs of all replicas."""
        return self.dp * self.shard.tp

    def kv_bytes(self, tokens: float) -> int:
        """Bytes on one GPU of the sequences of `batch`, at so many tokens each."""
        kind = self.shard.kind
        return math.ceil(
            self.batch * kind.blocks(math.ceil(tokens)) * kind.tokens * kind.token_bytes
        )


@dataclass(frozen=True)
class Demand:
    """A model and what it is to serve."""

    name: str
    shards: Mapping[int, Shard]
    rate: float
    """Requests a second."""
    ttft: float
    """Goal, seconds."""
    input: float
    """Tokens of a prompt, in the mean."""
    output: float
    tpot: float = math.inf

    @property
    def tokens(self) -> float:
        """Of a sequence when it ends."""
        return self.input + self.output


def prefill_seconds(costs: StepCosts, batch: int, tokens: float, budget: int = 8192) -> float:
    """Until `batch` prompts that came at once are computed, in steps of `budget` tokens."""
    total, time = batch * tokens, costs.first
    while total > 0:
        step = min(total, budget)
        time += costs.seconds(math.ceil(step), step * min(step, tokens) / 2, 0, 0.0)
        total -= step
    return time


def throughput(costs: StepCosts, batch: int, demand: Demand) -> float:
    """Requests a second of an engine that computes `batch` prompts, then all their tokens."""
    held = batch * (demand.input + demand.output / 2)
    step = costs.decode()(batch, held) + costs.host_seconds(0, batch)
    first = prefill_seconds(costs, batch, demand.input)
    return batch / (first + demand.output * step)


def options(
    demand: Demand,
    memory: int,
    gpus: int = 8,
    sequences: int = 256,
    reserve: float = 0.0,
) -> tuple[Option, ...]:
    """Ways to serve a demand with up to `gpus` GPUs, FineServe's rule: with each tp the fewest
    replicas whose batch for the rate is allowed by goal and memory; smallest batch first.

    memory: bytes of one GPU that weights and KV may take. reserve: bytes of it kept for activations.
    """
    found = []
    for tp, shard in sorted(demand.shards.items()):
        per_sequence = shard.kind.blocks(math.ceil(demand.tokens)) * shard.kind.tokens
        room = memory - shard.weights - reserve
        fit = int(room // (per_sequence * shard.kind.token_bytes)) if room > 0 else 0
        most = min(_most_in_time(demand, shard.costs, sequences), fit)
        if most < 1:
            continue
        batches = sorted({min(batch, most) for batch in _BATCHES})
        speeds = [throughput(shard.costs, batch, demand) for batch in batches]
        for dp in range(1, gpus // tp + 1):
            enough = [b for b, v in zip(batches, speeds, strict=True) if v >= demand.rate / dp]
            if enough:
                load = demand.rate / dp / max(speeds)
                found.append(Option(shard, dp, enough[0], most, load))
                break
    return tuple(sorted(found, key=lambda option: (option.batch, option.gpus)))


def _most_in_time(demand: Demand, costs: StepCosts, sequences: int) -> int:
    """The largest batch of which prompts and tokens come within the goals; 0 if none does."""
    decode = costs.decode()

    def meets(batch: int) -> bool:
        held = batch * demand.tokens
        step = decode(batch, held) + costs.host_seconds(0, batch)
        first = prefill_seconds(costs, batch, demand.input)
        return first <= demand.ttft and step <= demand.tpot

    low, high = 0, sequences + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if meets(middle) else (low, middle)
    return low


def short_of(demand: Demand, memory: int, gpus: int) -> str:
    """Why there is no option, in words that name the least of what is missing."""
    least = min(shard.weights for shard in demand.shards.values())
    if least >= memory:
        missing = (least - memory) / 2**30
        return f"{demand.name}: its weights are {missing:.1f} GiB more than a GPU holds"
    best = max(demand.shards.values(), key=lambda shard: shard.tp)
    alone = prefill_seconds(best.costs, 1, demand.input)
    if alone > demand.ttft:
        reason = f"a prompt alone takes {alone:.2f} s, the goal is {demand.ttft:.2f} s"
        return f"{demand.name}: {reason}"
    step = best.costs.decode()(1, demand.tokens) + best.costs.host_seconds(0, 1)
    if step > demand.tpot:
        reason = f"a token alone takes {step * 1e3:.1f} ms, the goal is {demand.tpot * 1e3:.1f} ms"
        return f"{demand.name}: {reason}"
    return f"{demand.name}: {gpus} GPUs do not keep up with {demand.rate:g} requests/s"


def demands_gpus(found: Sequence[Option]) -> int:
    """The fewest GPUs that an option takes; 0 if there is none."""
    return min((option.gpus for option in found), default=0)
