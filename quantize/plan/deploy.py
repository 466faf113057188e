"""Which engines a model needs, and where they stand: the fewest GPUs that meet each model's goals.

Each engine has its GPUs to itself; that several models share one is `placement`'s business.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from quantize.plan.gpus import Gpu
from quantize.plan.latency import CONSTANTS, Constants, StepTime
from quantize.plan.memory import Engine, Fit, engine_for, fit
from quantize.plan.request import Demand, Nodes, Request
from quantize.plan.served import ServedModel
from quantize.plan.steady import Limits, Load, Steady, best_rate, binding, steady

TPS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Option:
    """One way to run one model: engines of `tp` GPUs of one kind."""

    model: ServedModel
    demand: Demand
    gpu: Gpu
    tp: int
    engine: Engine
    fit: Fit
    refused: str | None
    """Why no engine runs so, whatever the goals; None where one does."""
    rate: float | None
    """Requests a second that one engine takes within the goals; None where no rate is asked for."""
    replicas: int
    """Engines that the whole rate takes; 0 where none meets the goals."""
    state: Steady | None
    """Of each engine at its share of the rate."""
    binds: str
    """What one engine has too little of to take more: memory, sequences, compute, ttft or tpot."""
    constants: Constants = CONSTANTS

    @property
    def gpus(self) -> int:
        """GPUs of all engines."""
        return self.tp * self.replicas

    @property
    def step(self) -> StepTime:
        """How long its steps take."""
        return StepTime(self.model, self.gpu, self.tp, self.constants)

    @property
    def works(self) -> bool:
        """Whether it meets all that is asked."""
        return self.refused is None and self.replicas > 0


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

    @property
    def feasible(self) -> bool:
        """Whether every model is placed and meets its goals."""
        return not self.missing

    @property
    def gpus(self) -> int:
        """GPUs in use."""
        return sum(len(engine.gpus) for engine in self.engines)


def name_of(demand: Demand) -> str:
    """How a model is called in tables and files."""
    return demand.name or demand.model.rstrip("/").rpartition("/")[2]


def option_for(
    demand: Demand, model: ServedModel, gpu: Gpu, tp: int, constants: Constants = CONSTANTS
) -> Option:
    """One model on engines of `tp` GPUs: what fits, what rate one takes, how many are needed."""
    from dataclasses import replace

    engine = replace(engine_for(gpu), utilization=demand.utilization)
    found = fit(model, gpu, tp, engine, demand.longest)
    refused = model.refuses(tp) or _too_large(model, found, demand)
    base = Option(
        model, demand, gpu, tp, engine, found, refused, None, 0, None, "memory", constants
    )
    if refused:
        return base
    if demand.rate is None:
        return replace(base, replicas=1)
    load = Load(demand.rate, demand.input, demand.output, demand.attainment)
    sequences = min(engine.max_sequences, found.blocks.sequences(load.context))
    limits = Limits(sequences, demand.ttft, demand.tpot)
    most = best_rate(base.step, engine, load, limits, demand.rate)
    if not most:
        idle = Load(0.0, demand.input, demand.output, demand.attainment)
        return replace(base, rate=0.0, binds=binding(base.step, engine, idle, limits))
    replicas = math.ceil(demand.rate / most - 1e-3)
    share = replace(load, rate=demand.rate / replicas)
    return replace(
        base,
        rate=most,
        replicas=replicas,
        state=steady(base.step, engine, share),
        binds=binding(base.step, engine, replace(load, rate=most), limits),
    )


def _too_large(model: ServedModel, found: Fit, demand: Demand) -> str | None:
    """Why memory does not do for even one sequence."""
    if model.max_context is not None and demand.longest > model.max_context:
        return f"the model ends at {model.max_context:,} tokens, not {demand.longest:,}"
    if not found.memory.fits:
        return f"weights and engine exceed a GPU's memory by {-found.memory.kv / 1e9:.1f} GB"
    if found.sequences < 1:
        need = model.kv_bytes(demand.longest) / 1e9
        return f"no room for one sequence of {demand.longest:,} tokens ({need:.1f} GB)"
    return None


def options_of(
    demand: Demand, model: ServedModel, cluster: Sequence[Nodes], constants: Constants = CONSTANTS
) -> list[Option]:
    """Every way to run one model on nodes of a cluster, the fewest GPUs first, then the fastest."""
    found = []
    for gpu, widest in _kinds(cluster).items():
        tps = [demand.tp] if demand.tp else [tp for tp in TPS if tp <= widest]
        found += [option_for(demand, model, gpu, tp, constants) for tp in tps]
    return sorted(
        found, key=lambda o: (not o.works, o.gpus or o.tp, o.state.tpot if o.state else 0)
    )


def _kinds(cluster: Sequence[Nodes]) -> dict[Gpu, int]:
    """Kinds of GPUs, with how many of them one node has at most."""
    widest: dict[Gpu, int] = {}
    for nodes in cluster:
        widest[nodes.kind] = max(widest.get(nodes.kind, 0), nodes.gpus)
    return widest


def plan_for(
    request: Request, models: Mapping[str, ServedModel], constants: Constants = CONSTANTS
) -> Plan:
    """Choose and place engines for all models: by priority, then those that need most GPUs.

    models: by `name_of` their demands.
    """
    options = {
        name_of(d): options_of(d, models[name_of(d)], request.cluster, constants)
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
