"""Why a plan cannot be: what is short, by how much, and the nearest change that would do."""

from __future__ import annotations

import math
from collections.abc import Sequence

from quantize.plan.deploy import Plan, Shortage, name_of, options_of
from quantize.plan.gpus import GPUS
from quantize.plan.kv import KV_TYPES
from quantize.plan.memory import short_of
from quantize.plan.request import Demand, Nodes
from quantize.plan.sizing import Option, option_for

_GIB = 2**30


def shortages(plan: Plan) -> list[Shortage]:
    """Of every model of a plan that has no place."""
    found = list(plan.told)
    if found:
        return found
    demands = {name_of(demand): demand for demand in plan.request.models}
    for name in plan.missing:
        options = plan.options[name]
        if all(option.refused for option in options):
            found.append(_memory(name, options))
        elif not any(option.wanted for option in options):
            found.append(_latency(name, demands[name], options))
        else:
            found.append(_gpus(name, demands[name], options, plan))
    return found


def _memory(name: str, options: Sequence[Option]) -> Shortage:
    """No engine of these GPUs holds the model and one sequence."""
    cut = [option for option in options if not option.model.refuses(option.tp)]
    if not cut:
        tps = ", ".join(str(option.tp) for option in options)
        return Shortage(name, "memory", f"{options[0].refused} (tp {tps})", ("another tp",))
    best = min(cut, key=lambda option: short_of(option.model, option.fit, option.tp))
    demand, model = best.demand, best.model
    if model.max_context is not None and demand.longest > model.max_context:
        return Shortage(
            name, "context", str(best.refused), (f"context {model.max_context:,} or less",)
        )
    lack = short_of(model, best.fit, best.tp)
    by = f"{lack / 1e9:.1f} GB on each of {best.tp} {best.gpu.name}"
    remedies = []
    usable = demand.utilization
    larger = [
        gpu for gpu in GPUS if gpu.memory_bytes * usable >= best.gpu.memory_bytes * usable + lack
    ]
    if larger:
        nearest = min(larger, key=lambda gpu: gpu.memory_gib)
        remedies.append(f"{nearest.name} ({nearest.memory_gib:.0f} GiB a GPU)")
    if best.fit.memory.fits:
        remedies.append(f"a context of {_longest(best):,} tokens")
        remedies += _smaller_kv(best)
    elif (room := model.weights(best.tp) - lack) > 0:
        share = room / model.weights(best.tp)
        remedies.append(f"a checkpoint of {100 * share:.0f} % of its bytes (fewer bits a weight)")
    if best.tp < 16:
        wider = option_for(demand, model, best.gpu, best.tp * 2)
        if not wider.refused:
            remedies.append(f"nodes of {best.tp * 2} GPUs, with tp {best.tp * 2}")
    return Shortage(name, "memory", by, tuple(remedies))


def _longest(option: Option) -> int:
    """Tokens of the longest sequence that fits."""
    low, high = 1, option.demand.longest
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if option.fit.blocks.sequences(middle) >= 1 else (low, middle)
    return low


def _smaller_kv(option: Option) -> list[str]:
    """Types of the KV cache in which one sequence fits, by bytes alone."""
    model, longest = option.model, option.demand.longest
    now = model.kv_bytes(longest, option.tp)
    plain = 2.0 * model.head_dim
    found = []
    for kind in KV_TYPES[1:]:
        size = now * kind.bytes(model.head_dim) / plain
        if size <= option.fit.memory.kv and size < now:
            found.append(f"KV cache in {kind.name}")
    return found[:1] if len(found) == len(KV_TYPES) - 1 else found[-1:]


def _latency(name: str, demand: Demand, options: Sequence[Option]) -> Shortage:
    """No engine meets the goals, however few requests it gets."""
    running = [option for option in options if not option.refused]
    tpot = min((option.alone, option.tp, option.gpu.name) for option in running)
    ttft = min((option.first, option.tp, option.gpu.name) for option in running)
    remedies, lacks = [], []
    if demand.tpot is not None and tpot[0] > demand.tpot:
        lacks.append(
            f"TPOT: {1e3 * tpot[0]:.1f} ms alone on {tpot[1]} {tpot[2]}, {1e3 * demand.tpot:.1f} ms asked"
        )
        remedies.append(f"tpot {_up(tpot[0])}")
    if demand.ttft is not None and ttft[0] > demand.ttft:
        lacks.append(
            f"TTFT: {ttft[0]:.2f} s alone on {ttft[1]} {ttft[2]}, {demand.ttft:.2f} s asked"
        )
        remedies.append(f"ttft {_up(ttft[0])}")
    if not lacks:
        lacks.append("no width of engine meets both goals at once")
        remedies.append(f"tpot {_up(tpot[0])} and ttft {_up(ttft[0])}")
    if demand.tp is not None:
        remedies.append("another tp")
    remedies.append("fewer bits a weight, or a GPU of more bandwidth (TPOT) or rate (TTFT)")
    return Shortage(name, "latency", "; ".join(lacks), tuple(remedies))


def _up(seconds: float) -> str:
    """Two digits, rounded up, with a tenth to spare."""
    scale = 10.0 ** (1 - math.floor(math.log10(seconds)))
    return f"{math.ceil(1.1 * seconds * scale) / scale:g}"


def _gpus(name: str, demand: Demand, options: Sequence[Option], plan: Plan) -> Shortage:
    """The goals can be met, with more GPUs than are left."""
    best = min((o for o in options if o.wanted), key=lambda o: (o.wanted * o.tp, o.tp))
    needed = best.wanted * best.tp
    there = sum(nodes.gpus * nodes.nodes for nodes in plan.request.cluster)
    left = there - plan.gpus
    least = "" if best.works else "at least "
    by = f"{least}{needed} {best.gpu.name} needed, {left} of {there} GPUs left"
    remedies = [f"{needed - left} more {best.gpu.name}"] if needed > left else []
    if best.rate is not None and (most := _placed_rate(options, plan)) > 0:
        remedies.append(f"a rate of {most:.3g} requests a second")
        if eased := _eased(demand, best, plan.request.cluster, left):
            remedies.append(eased)
    remedies.append("fewer bits a weight or a token of the KV cache: see --compare")
    return Shortage(name, "gpus", by, tuple(remedies))


def _placed_rate(options: Sequence[Option], plan: Plan) -> float:
    """The highest rate that engines on the GPUs left would take."""
    used: dict[tuple[int, int], int] = {}
    for engine in plan.engines:
        place = (engine.nodes, engine.node)
        used[place] = used.get(place, 0) + len(engine.gpus)
    best = 0.0
    for option in options:
        if option.rate:
            rooms = sum(
                (nodes.gpus - used.get((i, j), 0)) // option.tp
                for i, nodes in enumerate(plan.request.cluster)
                if nodes.kind == option.gpu
                for j in range(nodes.nodes)
            )
            best = max(best, rooms * option.rate)
    return best


def _eased(demand: Demand, best: Option, cluster: Sequence[Nodes], left: int) -> str | None:
    """A goal that is the bound, and by how much it must give way for the GPUs that are left."""
    for goal in ("tpot", "ttft"):
        asked = getattr(demand, goal)
        if asked is None or best.binds != goal:
            continue
        for factor in (1.1, 1.25, 1.5, 2, 3, 5):
            eased = demand.model_copy(update={goal: asked * factor})
            found = [o for o in options_of(eased, best.model, cluster, best.constants) if o.works]
            if found and found[0].gpus <= left:
                return f"{goal} {asked * factor:.3g} s in the place of {asked:.3g} s"
    return None
