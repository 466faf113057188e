"""A placement as engines to simulate: their setups, and the memory that weights leave them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from quantize.plan.placement import Cluster, Placement
from quantize.plan.simulate.memory import Everywhere, Memory, Share, Slabs
from quantize.plan.simulate.prefixes import Cached, Chains
from quantize.plan.simulate.setup import EngineSetup
from quantize.plan.slabs import SlabPool, Tenant, fixed_pools

Pools = Callable[[int, Sequence[Tenant]], Mapping[str, SlabPool]]
"""(bytes, engines) → engine → its pool: one of `slabs`' functions."""


@dataclass(frozen=True)
class Serving:
    """How the engines of a placement work."""

    policy: str = "fcfs"
    drop: bool = False
    pools: Pools | None = fixed_pools
    """None: fixed shares, by rate and bytes a token."""
    batched_tokens: int = 8192
    sequences: int = 256
    guarantee: int = 0
    """Tokens that each engine can always hold in slabs."""
    token_seconds: Mapping[str, float] | None = None
    """Demand → seconds a token of a prompt, for policies; None: from its costs."""
    chains: Mapping[str, Chains] = field(default_factory=dict)
    """Demand → the prompts of all requests, where its engines keep a prefix cache; fixed shares only."""


def engines(
    placement: Placement, cluster: Cluster, models: Sequence[str], how: Serving
) -> list[tuple[EngineSetup, Memory]]:
    """Engines for `simulate`; `models` are the names of demands in the order of requests' `model`."""
    free = placement.free(cluster)
    tenants = [
        Tenant(str(i), r.option.shard.kind, r.demand.rate / r.option.dp, how.guarantee)
        for i, r in enumerate(placement.replicas)
    ]
    residents: dict[tuple[int, ...], int] = {}
    """Engines of a GPU → the least memory of GPUs with just these."""
    for gpu, room in enumerate(free):
        here = tuple(i for i, r in enumerate(placement.replicas) if gpu in r.gpus)
        if here:
            residents[here] = min(room, residents.get(here, room))
    memories: list[list[Slabs]] = [[] for _ in tenants]
    shares = [0] * len(tenants)
    for here, room in residents.items():
        weight = {i: tenants[i].rate * tenants[i].kind.token_bytes for i in here}
        pools = how.pools(room, [tenants[i] for i in here]) if how.pools else {}
        for i in here:
            kind = tenants[i].kind
            if how.pools:
                memories[i].append(Slabs(pools[str(i)], kind))
            else:
                part = room * weight[i] / sum(weight.values())
                blocks = int(part // (kind.block_bytes * kind.parts))
                shares[i] = min(blocks, shares[i] or blocks)
    made: list[tuple[EngineSetup, Memory]] = []
    for i, replica in enumerate(placement.replicas):
        name = replica.demand.name
        setup = EngineSetup(
            replica.option.shard.costs,
            replica.gpus,
            models.index(name),
            how.batched_tokens,
            how.sequences,
            how.policy,
            replica.demand.ttft,
            (how.token_seconds or {}).get(name, 0.0),
            how.drop,
        )
        memory: Memory
        if not how.pools and name in how.chains:
            memory = Cached(shares[i], how.chains[name], tenants[i].kind.tokens)
        elif not how.pools:
            memory = Share(shares[i], tenants[i].kind.tokens)
        elif len(memories[i]) == 1:
            memory = memories[i][0]
        else:
            memory = Everywhere(memories[i])
        made.append((setup, memory))
    return made
