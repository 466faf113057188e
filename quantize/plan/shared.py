"""A plan in which engines of several models share GPUs: placed by load, served from one clock.

Engines of one GPU divide its memory by fixed shares, as vLLM does, or take slabs from one pool; their
steps slow each other down. All that is asked is simulated together, and the fewest GPUs are looked
for with which every model meets its goals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from quantize.errors import UsageError
from quantize.plan import demand as asking
from quantize.plan.gpus import Gpu
from quantize.plan.latency import Constants
from quantize.plan.memory import engine_for, memory_of
from quantize.plan.placement import Cluster, Placement, best, fineserve, prism
from quantize.plan.request import Demand, Request
from quantize.plan.served import ServedModel
from quantize.plan.simulate.costs import model_costs
from quantize.plan.simulate.memory import Memory, Share
from quantize.plan.simulate.placed import Pools, Serving, engines
from quantize.plan.simulate.prefixes import Chains, chains
from quantize.plan.simulate.requests import Requests, poisson, requests
from quantize.plan.simulate.run import Outcome, simulate
from quantize.plan.simulate.setup import EngineSetup
from quantize.plan.simulated import clipped
from quantize.plan.slabs import KvFormat, SlabPool, Tenant, fixed_pools, paper_pools, smallest_slab

PLACEMENTS: Mapping[str, Callable[[Sequence[asking.Demand], Cluster], Placement]] = {
    "best": best,
    "fineserve": fineserve,
    "prism": prism,
}
BLOCK = 16
"""Tokens of a block of KV cache."""
WHOLE = (
    "Prompts that begin alike are computed whole: slabs keep no prefixes here. memory: shares has a "
    "prefix cache for each engine."
)
_COUNT = 2000
"""Requests that are drawn for each model in the mean."""
_LEAST = 300
"""Of a model that has few: a share of 90 % is then known to two percent."""


@dataclass(frozen=True)
class Shared:
    """Engines on GPUs that they share, and what became of all requests together."""

    gpu: Gpu
    cluster: Cluster
    """As many GPUs as are used."""
    placement: Placement
    setups: tuple[tuple[EngineSetup, Memory], ...]
    """One for each replica of the placement, after the simulation."""
    outcome: Outcome
    """Of the requests of all models; `model` is the place of the demand in the request."""
    attainment: tuple[float, ...]
    """Share of the requests of each demand that met its goals."""
    asked: tuple[asking.Demand, ...] = ()
    """What was placed."""
    chains: Mapping[str, Chains] = field(default_factory=dict, repr=False)
    """By model, where its engines keep a prefix cache; see `chains_of`."""
    alone: int | None = None
    """GPUs that the same models take if each engine has its own; None where there are not so many."""

    @property
    def whole(self) -> bool:
        """Whether prompts that begin alike are computed whole, since slabs keep no prefixes."""
        return not self.chains and bool(self.outcome.requests.prefix.any())

    def held(self, replica: int) -> int:
        """Bytes of weights, activations and graphs of an engine on each of its GPUs."""
        return self.placement.replicas[replica].option.shard.weights

    def kv(self, replica: int) -> int:
        """Bytes of KV cache that an engine has on each of its GPUs: its share, or with slabs at most."""
        kind = self.placement.replicas[replica].option.shard.kind
        memory = self.setups[replica][1]
        unit = kind.block_bytes * kind.parts if isinstance(memory, Share) else 1
        return int(memory.capacity * unit)

    def kv_used(self, replica: int, used: float) -> float:
        """Bytes, of what a sample calls `used` of an engine."""
        kind = self.placement.replicas[replica].option.shard.kind
        shares = isinstance(self.setups[replica][1], Share)
        return used * kind.block_bytes * kind.parts if shares else used


def kv_format(model: ServedModel, tp: int) -> KvFormat:
    """Blocks of 16 tokens of one layer's keys, or values. Layers that keep unlike are counted as if all
    kept the mean of them, and a window as if it had no end: slabs know nothing of either."""
    if not model.kv:
        raise UsageError(f"{model.name}: keeps no keys and values; sharing is for models that do")
    if any(layer.fixed_bytes for layer in model.kv):
        raise UsageError(
            f"{model.name}: keeps a state beside keys and values, which slabs do not hold; give it "
            "GPUs of its own"
        )
    latent = all(layer.heads == 1 for layer in model.kv) and model.latent_dim > 0
    parts = len(model.kv) * (1 if latent else 2)
    return KvFormat(math.ceil(BLOCK * model.kv_bytes_per_token(tp) / parts), parts, BLOCK)


def demand_of(
    demand: Demand,
    name: str,
    model: ServedModel,
    gpu: Gpu,
    widest: int,
    stream: Requests,
    constants: Constants,
) -> asking.Demand:
    """A demand as placements take it, with a shard for each width that an engine runs in."""
    longest = int((stream.input + stream.output).max())
    if model.max_context is not None and longest > model.max_context:
        raise UsageError(
            f"{name}: its requests have up to {longest:,} tokens, and the model ends at "
            f"{model.max_context:,}; give it context: {model.max_context}, to which they are cut"
        )
    engine = replace(engine_for(gpu), utilization=demand.utilization)
    tps = (demand.tp,) if demand.tp else tuple(tp for tp in asking.SIZES if tp <= widest)
    shards = {}
    for tp in tps:
        if model.refuses(tp) is None and tp <= widest:
            spent = memory_of(model, gpu, tp, engine)
            own = spent.weights + spent.activations + spent.overhead
            costs = model_costs(model, gpu, tp, constants)
            shards[tp] = asking.Shard(tp, own, kv_format(model, tp), costs)
    if not shards:
        shown = ", ".join(map(str, tps))
        raise UsageError(f"{name}: no engine of tp {shown} runs it on nodes of {widest} GPUs")
    return asking.Demand(
        name,
        shards,
        max(stream.rate, 1e-9),
        demand.ttft or math.inf,
        float(stream.input.mean()),
        float(stream.output.mean()),
        demand.tpot or math.inf,
    )


def streams_of(demands: Sequence[Demand], seed: int = 0) -> list[Requests]:
    """Requests of each demand over one span of time: traces in full, rates as long as they last."""
    traces = {i: requests(demand.trace, seed) for i, demand in enumerate(demands) if demand.trace}
    rates = [demand.rate for demand in demands if demand.rate]
    span = max(
        (float(trace.arrival[-1]) for trace in traces.values()),
        default=_COUNT * len(rates) / max(sum(rates), 1e-9),
    )
    found = []
    for i, demand in enumerate(demands):
        if i in traces:
            stream = traces[i]
        else:
            rate = demand.rate or 0.0
            count = max(_LEAST, round(rate * span))
            draw = np.random.default_rng((seed, i))
            stream = poisson(rate, count, draw, demand.input, demand.output, demand.spread)
        stream = clipped(stream, demand).for_model(i)
        if not demand.prefix_cache:
            zeros = np.zeros_like(stream.prefix)
            stream = replace(stream, prefix=zeros, source=zeros - 1)
        found.append(stream)
    return found


def chains_of(request: Request, names: Sequence[str], stream: Requests) -> Mapping[str, Chains]:
    """Prompts in pieces for each model whose engines find prefixes again; none of those in slabs, which
    keep nothing of answered requests."""
    assert request.sharing is not None
    begun = set(stream.model[stream.prefix > 0].tolist())
    if not begun or request.sharing.memory != "shares":
        return {}
    made = chains(stream, BLOCK)
    return {name: made for i, name in enumerate(names) if i in begun}


def serve(
    request: Request,
    asked: Sequence[asking.Demand],
    stream: Requests,
    gpu: Gpu,
    cluster: Cluster,
    chained: Mapping[str, Chains],
    samples: bool = False,
) -> Shared | None:
    """Place all demands on a cluster and serve the stream; None where one has no place.

    chained: of the stream, by `chains_of`. samples: record the engines' states over time.
    """
    assert request.sharing is not None
    placement = PLACEMENTS[request.sharing.placement](asked, cluster)
    if placement.unplaced:
        return None
    return run(request, tuple(asked), placement, stream, gpu, cluster, chained, samples)


def run(
    request: Request,
    asked: tuple[asking.Demand, ...],
    placement: Placement,
    stream: Requests,
    gpu: Gpu,
    cluster: Cluster,
    chained: Mapping[str, Chains],
    samples: bool = False,
) -> Shared:
    """Serve a stream by engines that stand already; see `serve`."""
    sharing = request.sharing
    assert sharing is not None
    engine = engine_for(gpu)
    how = Serving(
        sharing.policy,
        sharing.drop,
        _pools(sharing.memory, engine.batched_tokens),
        engine.batched_tokens,
        engine.max_sequences,
        chains=chained,
    )
    made = engines(placement, cluster, [demand.name for demand in asked], how)
    outcome = simulate(stream, made, samples=samples)
    goals = (np.array([getattr(one, goal) for one in asked]) for goal in ("ttft", "tpot"))
    met = outcome.met(*(goal[stream.model] for goal in goals))
    shares = tuple(float(met[stream.model == i].mean()) for i in range(len(asked)))
    return Shared(gpu, cluster, placement, tuple(made), outcome, shares, asked, chained)


def again(request: Request, found: Shared, factor: float) -> Shared:
    """The same engines with the same requests, which come so many times as fast."""
    stream = found.outcome.requests
    faster = stream.at_rate(stream.rate * factor)
    return run(
        request, found.asked, found.placement, faster, found.gpu, found.cluster, found.chains
    )


def _pools(memory: str, batched_tokens: int) -> Pools | None:
    """How engines of one GPU divide what weights leave; None: by fixed shares."""
    if memory == "shares":
        return None
    if memory == "paper":
        return partial(paper_pools, batched_tokens=batched_tokens)

    def slabs(total: int, tenants: Sequence[Tenant]) -> Mapping[str, SlabPool]:
        size = smallest_slab(tenant.kind for tenant in tenants)
        return fixed_pools(total, tenants, size)

    return slabs


def meets(request: Request, found: Shared | None) -> bool:
    """Whether every model is placed and meets its goals."""
    return found is not None and all(
        share >= demand.attainment
        for share, demand in zip(found.attainment, request.models, strict=True)
    )
