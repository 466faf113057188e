"""Which engines a model needs, and where they stand: the fewest GPUs that meet each model's goals.

Each engine has its GPUs to itself; plans in which several share one are made in `sharing`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from quantize.plan.gpus import Gpu
from quantize.plan.latency import CONSTANTS, Constants
from quantize.plan.request import Demand, Nodes, Request
from quantize.plan.served import ServedModel
from quantize.plan.shared import Shared
from quantize.plan.simulate.costs import StepCosts
from quantize.plan.simulated import stream_of
from quantize.plan.sizing import Option, option_for, with_simulation

TPS = (1, 2, 4, 8, 16)
_ENGINES = 256
"""Of one model, at most: the simulator looks at each."""


@dataclass(frozen=True)
class Engines:
    """One engine of a plan and the GPUs it stands on."""

    name: str
    nodes: int
    """Which entry of the cluster."""
    node: int
    """Which node of that entry, from 0."""
    gpus: tuple[int, ...]
    """Which of its GPUs, from 0."""


@dataclass(frozen=True)
class Shortage:
    """One model that cannot be served as asked."""

    name: str
    short: str
    """memory, context, latency or gpus."""
    by: str
    """How much, in words."""
    remedies: tuple[str, ...]
    """Each of them alone would do, as far as the estimate goes."""


@dataclass(frozen=True)
class Plan:
    """A deployment, whole or as far as it goes."""

    request: Request
    chosen: Mapping[str, Option]
    """By name of the model."""
    options: Mapping[str, Sequence[Option]]
    """All that were looked at, best first."""
    engines: tuple[Engines, ...]
    missing: tuple[str, ...] = field(default=())
    """Models that have no place, or no way to meet their goals."""
    shared: Shared | None = None
    """Where engines share GPUs: how they do, and what came of it."""
    told: tuple[Shortage, ...] = ()
    """What is short, where planning has told it already."""

    @property
    def feasible(self) -> bool:
        """Whether every model is placed and meets its goals."""
        return not self.missing

    @property
    def gpus(self) -> int:
        """GPUs in use."""
        return len({(e.nodes, e.node, gpu) for e in self.engines for gpu in e.gpus})


def name_of(demand: Demand) -> str:
    """How a model is called in tables and files."""
    return demand.name or demand.model.rstrip("/").rpartition("/")[2]


def options_of(
    demand: Demand,
    model: ServedModel,
    cluster: Sequence[Nodes],
    constants: Constants = CONSTANTS,
    profile: Mapping[int, StepCosts] | None = None,
) -> list[Option]:
    """Every way to run one model on nodes of a cluster, the fewest GPUs first, then the fastest.

    UsageError for a trace that cannot be read.
    """
    stream = stream_of(demand)
    room, found = {}, []
    for gpu, (widest, every) in _kinds(cluster).items():
        room[gpu] = every
        tps = [demand.tp] if demand.tp else [tp for tp in TPS if tp <= widest]
        found += [option_for(demand, model, gpu, tp, constants, stream, profile) for tp in tps]
    found.sort(key=_order)
    if stream is None or (demand.ttft is None and demand.tpot is None):
        return found
    # The closed form is near enough to tell which are worth their simulation: the best, and those
    # that it gives as many GPUs as that turns out to need.
    least = math.inf
    for i, option in enumerate(found):
        if option.works and option.gpus <= least:
            most = min(_ENGINES, max(1, room[option.gpu] // option.tp))
            found[i] = with_simulation(option, stream, most)
            least = min(least, found[i].gpus or math.inf)
    return sorted(found, key=_order)


def _order(option: Option) -> tuple[bool, int, float]:
    tpot = option.state.tpot if option.state else 0.0
    return (not option.works, option.gpus or option.tp * max(1, option.wanted), tpot)


def _kinds(cluster: Sequence[Nodes]) -> dict[Gpu, tuple[int, int]]:
    """Kinds of GPUs, with how many of them one node has at most, and all together."""
    kinds: dict[Gpu, tuple[int, int]] = {}
    for nodes in cluster:
        widest, every = kinds.get(nodes.kind, (0, 0))
        kinds[nodes.kind] = (max(widest, nodes.gpus), every + nodes.gpus * nodes.nodes)
    return kinds


def plan_for(
    request: Request,
    models: Mapping[str, ServedModel],
    constants: Constants = CONSTANTS,
    profile: Mapping[int, StepCosts] | None = None,
) -> Plan:
    """Choose and place engines for all models: by priority, then those that need most GPUs.

    models: by `name_of` their demands. profile: measured costs of all of them, by tp.
    """
    options = {
        name_of(d): options_of(d, models[name_of(d)], request.cluster, constants, profile)
        for d in request.models
    }
    order = sorted(
        request.models,
        key=lambda d: (-d.priority, -(options[name_of(d)][0].gpus if options[name_of(d)] else 0)),
    )
    free = [[nodes.gpus] * nodes.nodes for nodes in request.cluster]
    chosen: dict[str, Option] = {}
    engines: list[Engines] = []
    missing = []
    for demand in order:
        name = name_of(demand)
        for option in options[name]:
            places = _place(option, name, request.cluster, free) if option.works else None
            if places is not None:
                chosen[name] = option
                engines += places
                break
        else:
            missing.append(name)
    return Plan(request, chosen, options, tuple(engines), tuple(missing))


def _place(
    option: Option, name: str, cluster: Sequence[Nodes], free: list[list[int]]
) -> list[Engines] | None:
    """GPUs for all engines of an option, those of a node being its first; None, and nothing taken,
    where they do not all fit. The fullest node that has room is taken first."""
    places: list[Engines] = []
    left = [list(row) for row in free]
    for _ in range(option.replicas):
        rooms = [
            (left[i][j], i, j)
            for i, nodes in enumerate(cluster)
            if nodes.kind == option.gpu
            for j in range(nodes.nodes)
            if left[i][j] >= option.tp
        ]
        if not rooms:
            return None
        room, i, j = min(rooms)
        first = cluster[i].gpus - room
        places.append(Engines(name, i, j, tuple(range(first, first + option.tp))))
        left[i][j] -= option.tp
    free[:] = left
    return places
