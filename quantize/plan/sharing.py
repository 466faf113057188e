"""The plan of a request whose engines share GPUs: the fewest that do, or what is short."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from quantize.errors import UsageError
from quantize.plan import demand as asking
from quantize.plan.deploy import Engines, Plan, Shortage, name_of, plan_for
from quantize.plan.gpus import Gpu
from quantize.plan.latency import CONSTANTS, Constants
from quantize.plan.memory import Fit, Memory, blocks_of, engine_for, memory_of
from quantize.plan.placement import Cluster
from quantize.plan.request import Demand, Request
from quantize.plan.served import ServedModel
from quantize.plan.shared import Shared, chains_of, demand_of, meets, serve, streams_of
from quantize.plan.simulate.costs import StepCosts
from quantize.plan.simulate.prefixes import Chains
from quantize.plan.simulate.requests import Requests, merged
from quantize.plan.simulate.run import Outcome
from quantize.plan.simulated import Simulated, judged
from quantize.plan.sizing import Option

_FAR = 4
"""Times the GPUs there are, up to which a number is looked for that would do."""
_LESS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
"""Of the rates asked for, which are looked at where they are too high."""


@dataclass(frozen=True)
class _Asked:
    """What is asked, as the simulator and placements take it."""

    request: Request
    models: Mapping[str, ServedModel]
    demands: tuple[asking.Demand, ...]
    stream: Requests
    gpu: Gpu
    per_node: int
    chains: Mapping[str, Chains]

    def on(self, gpus: int, samples: bool = False) -> Shared | None:
        """Served by so many GPUs; None where a model has no place. samples: with the states over
        time."""
        share = min(demand.utilization for demand in self.request.models)
        room = int(self.gpu.memory_bytes * share)
        cluster = Cluster(gpus, room, self.per_node)
        stream, chained = self.stream, self.chains
        return serve(self.request, self.demands, stream, self.gpu, cluster, chained, samples)

    def does(self, gpus: int) -> bool:
        """Whether so many GPUs do."""
        return meets(self.request, self.on(gpus))

    def slower(self, factor: float) -> _Asked:
        """The same with requests that come at so many times the rate."""
        demands = tuple(replace(one, rate=one.rate * factor) for one in self.demands)
        slow = self.stream.at_rate(self.stream.rate * factor)
        return replace(self, demands=demands, stream=slow)


def _asked(request: Request, models: Mapping[str, ServedModel], constants: Constants) -> _Asked:
    nodes = request.cluster[0]
    streams = streams_of(request.models)
    demands = tuple(
        demand_of(one, name_of(one), models[name_of(one)], nodes.kind, nodes.gpus, own, constants)
        for one, own in zip(request.models, streams, strict=True)
    )
    stream = merged(streams)
    chained = chains_of(request, [one.name for one in demands], stream)
    return _Asked(request, models, demands, stream, nodes.kind, nodes.gpus, chained)


def plan_of(
    request: Request,
    models: Mapping[str, ServedModel],
    constants: Constants = CONSTANTS,
    profile: Mapping[int, StepCosts] | None = None,
) -> Plan:
    """The plan of a request, shared or not; see `plan_for` and `plan_shared`. UsageError for measured
    costs where engines share GPUs."""
    if request.sharing is None:
        return plan_for(request, models, constants, profile)
    if profile is not None:
        raise UsageError("--profile: measured times are of engines that have their GPUs alone")
    return plan_shared(request, models, constants)


def plan_shared(
    request: Request, models: Mapping[str, ServedModel], constants: Constants = CONSTANTS
) -> Plan:
    """Place engines so that they share the fewest GPUs with which all models meet their goals.

    models: by `name_of` their demands. UsageError for a model that cannot share, and for a trace
    that cannot be read.
    """
    asked = _asked(request, models, constants)
    every = request.cluster[0].gpus * request.cluster[0].nodes
    count = _fewest(asked, every)
    if count is None:
        return _short(asked, every)
    found = asked.on(count, samples=True)
    assert found is not None
    own = plan_for(request.model_copy(update={"sharing": None}), models, constants)
    found = replace(found, alone=own.gpus if own.feasible else None)
    return _plan(asked, found)


def _fewest(asked: _Asked, most: int) -> int | None:
    """The fewest GPUs that do, up to `most`; None where those do not."""
    low, high = 0, 1
    while not asked.does(high):
        if high >= most:
            return None
        low, high = high, min(most, 2 * high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if asked.does(middle) else (middle, high)
    return high


def _plan(asked: _Asked, shared: Shared) -> Plan:
    request = asked.request
    chosen = {
        name_of(demand): _option(asked, shared, i, demand)
        for i, demand in enumerate(request.models)
    }
    engines = tuple(
        Engines(
            replica.demand.name,
            0,
            replica.gpus[0] // asked.per_node,
            tuple(gpu % asked.per_node for gpu in replica.gpus),
        )
        for replica in shared.placement.replicas
    )
    options = {name: (option,) for name, option in chosen.items()}
    return Plan(request, chosen, options, engines, shared=shared)


def _option(asked: _Asked, shared: Shared, index: int, demand: Demand) -> Option:
    """A model's engines as a plan has them; memory is that of the one with the least."""
    name = name_of(demand)
    model, gpu = asked.models[name], asked.gpu
    mine = [i for i, one in enumerate(shared.placement.replicas) if one.demand.name == name]
    tp = shared.placement.replicas[mine[0]].option.shard.tp
    kv = min(shared.kv(i) for i in mine)
    engine = replace(engine_for(gpu), utilization=demand.utilization)
    spent = memory_of(model, gpu, tp, engine)
    used = spent.weights + spent.activations + spent.overhead + kv
    # Rounded down, so that those of one GPU are not more than all of it.
    engine = replace(engine, utilization=int(1000 * used / gpu.memory_bytes) / 1000)
    memory = Memory(spent.total, used, spent.weights, spent.activations, spent.overhead, kv)
    found = Fit(memory, blocks_of(model, tp, kv, engine.block), demand.longest)
    return Option(
        model,
        demand,
        gpu,
        tp,
        engine,
        found,
        replicas=len(mine),
        wanted=len(mine),
        simulated=_simulated(shared, index, mine, demand),
    )


def _simulated(shared: Shared, index: int, mine: list[int], demand: Demand) -> Simulated:
    """What became of one model's requests."""
    whole = shared.outcome
    kept = whole.requests.model == index
    columns = ("arrival", "input", "output", "prefix", "model")
    own = Requests(*(getattr(whole.requests, column)[kept] for column in columns))
    part = Outcome(
        own,
        whole.first[kept],
        whole.finish[kept],
        whole.dropped[kept],
        sum(whole.preempted[i] for i in mine),
        whole.recomputed,
        whole.seconds,
        tuple(whole.busy[i] for i in mine),
        [(time, mine.index(e), *rest) for time, e, *rest in whole.rows if e in mine],  # type: ignore[misc]
        tuple(whole.preempted[i] for i in mine),
        tuple(whole.found[i] for i in mine),
    )
    return judged(part, demand)


def _short(asked: _Asked, every: int) -> Plan:
    """A plan that names what is short: models without a place on all GPUs, or that miss their goals."""
    request, gpu = asked.request, asked.gpu
    found = asked.on(every)
    enough = next((n for n in _more(every) if asked.does(n)), None)
    remedies = [f"{enough} {gpu.name} in the place of {every}"] if enough else []
    slower = next((factor for factor in _LESS if asked.slower(factor).does(every)), None)
    if slower is not None:
        remedies.append(f"rates of {100 * slower:.0f} % of those asked for")
    remedies.append("fewer bits a weight or a token of the KV cache: see --compare")
    told = []
    for i, demand in enumerate(request.models):
        name = name_of(demand)
        if found is None:
            told.append(Shortage(name, "gpus", f"{every} {gpu.name} do not hold all models", ()))
        elif found.attainment[i] < demand.attainment:
            by = f"{found.attainment[i]:.0%} of requests meet the goals, {demand.attainment:.0%} asked"
            told.append(Shortage(name, "latency", by, ()))
    told = [replace(one, remedies=tuple(remedies)) for one in told]
    names = tuple(one.name for one in told)
    return Plan(request, {}, dict.fromkeys(asked.models, ()), (), names, told=tuple(told))


def _more(every: int) -> list[int]:
    """Numbers of GPUs above those there are."""
    return [*range(every + 1, min(every + 9, _FAR * every)), 2 * every, _FAR * every]
