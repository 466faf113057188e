"""GPUs that engines share: what lies on each, and its memory over time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from quantize.pictures import Bars, Lines, Picture, Table
from quantize.plan.deploy import Plan
from quantize.plan.shared import Shared, again
from quantize.plan.simulate.memory import Slabs
from quantize.report.model import Group, Item

_GIB = 2**30
_GPUS = 24
"""Drawn at most; others are like them."""
_CURVES = 8
"""GPUs whose memory is drawn over time, at most."""
_MOMENTS = 160


def gpus(shared: Shared) -> Iterator[Picture]:
    """Each GPU in use with the weights of its engines and their KV cache at its fullest moment."""
    places = _in_use(shared)[:_GPUS]
    names = [demand.name for demand in shared.asked]
    drawn: dict[str, list[float]] = {}
    engine = {name: "weights, engine: " + name for name in names}
    curves_of = {gpu: _curves(shared, gpu) for gpu in places}
    cached = dict.fromkeys(f"KV: {name}" for curves in curves_of.values() for name in curves)
    parts = [*engine.values(), *cached, _free(shared), "left to others"]
    columns = []
    for gpu, curves in curves_of.items():
        column = dict.fromkeys(parts, 0.0)
        for i, replica in enumerate(shared.placement.replicas):
            if gpu in replica.gpus:
                column[engine[replica.demand.name]] += shared.held(i)
        weights = sum(column.values())
        total = sum(curves.values(), np.zeros(_MOMENTS))
        fullest = int(np.argmax(total))
        for name, curve in curves.items():
            column[f"KV: {name}"] += float(curve[fullest])
        column[parts[-2]] = shared.cluster.memory - weights - float(total[fullest])
        column[parts[-1]] = shared.gpu.memory_bytes - shared.cluster.memory
        columns.append(column)
    for part in parts:
        values = [column[part] / _GIB for column in columns]
        if any(values):
            drawn[part] = values
    more = len(_in_use(shared)) - len(places)
    caption = "Weights with what the engine takes, and KV cache at the GPU's fullest moment."
    caption += f" {more} more GPUs are not drawn." if more else ""
    labels = [f"GPU {gpu}" for gpu in places]
    yield Bars("Memory of each GPU", caption, labels, drawn, "GiB", stacked=True)


def _free(shared: Shared) -> str:
    return "free slabs" if _slabs(shared) else "free blocks of the shares"


def _slabs(shared: Shared) -> bool:
    return any(memory.pools for _, memory in shared.setups)


def _in_use(shared: Shared) -> list[int]:
    return sorted({gpu for replica in shared.placement.replicas for gpu in replica.gpus})


def _curves(shared: Shared, gpu: int) -> dict[str, NDArray[np.float64]]:
    """Model → bytes of KV cache that its engines hold on a GPU, over the moments that are drawn. Slabs
    belong to a format: engines of one format on a GPU are one curve, under all their names."""
    moments = np.linspace(0.0, shared.outcome.seconds, _MOMENTS)
    found: dict[str, NDArray[np.float64]] = {}
    drawn: dict[object, str] = {}
    for i, replica in enumerate(shared.placement.replicas):
        if gpu not in replica.gpus:
            continue
        memory = shared.setups[i][1]
        key: object = i
        if memory.pools:
            key = tuple(map(id, memory.pools)), replica.option.shard.kind
        own = shared.outcome.samples_of(i)
        curve = steps(own["time"], own["used"] * shared.kv_used(i, 1.0), moments)
        if key in drawn:  # the same slabs, as another engine of the format saw them
            before = found.pop(drawn[key])
            if replica.demand.name not in drawn[key].split(" + "):
                drawn[key] += f" + {replica.demand.name}"
            found[drawn[key]] = np.maximum(before, curve)
            continue
        drawn[key] = replica.demand.name
        other = found.get(replica.demand.name)
        found[replica.demand.name] = curve if other is None else other + curve
    return found


def steps(
    times: NDArray[np.float64], values: NDArray[np.float64], moments: NDArray[np.float64]
) -> NDArray[np.float64]:
    """What `values` were last at each moment; 0 before the first of their `times`."""
    if not len(times):
        return np.zeros(len(moments))
    at = np.searchsorted(times, moments, side="right") - 1
    return np.where(at >= 0, values[np.maximum(at, 0)], 0.0)


def memory(shared: Shared) -> Iterator[Item]:
    """KV cache of each GPU over time, by model, below what there is."""
    moments = np.linspace(0.0, shared.outcome.seconds, _MOMENTS).tolist()
    pictures: list[Picture] = []
    for gpu in _in_use(shared)[:_CURVES]:
        held = sum(
            shared.held(i)
            for i, replica in enumerate(shared.placement.replicas)
            if gpu in replica.gpus
        )
        room = (shared.cluster.memory - held) / _GIB
        curves = {name: (curve / _GIB).tolist() for name, curve in _curves(shared, gpu).items()}
        what = "Slabs held" if _slabs(shared) else "Blocks in use"
        caption = f"{what}, of {room:.1f} GiB that weights and engines leave."
        pictures.append(Lines(f"GPU {gpu}", caption, moments, curves, "seconds", "GiB"))
    yield Group("KV memory of each GPU", "Of all engines on it.", pictures)


def slabs(shared: Shared) -> Iterator[Picture]:
    """Sizes of slabs and what blocks leave of them; nothing for fixed shares."""
    rows: list[tuple[str, int, float, int, float, float]] = []
    for i, replica in enumerate(shared.placement.replicas):
        memory = shared.setups[i][1]
        if not isinstance(memory, Slabs):
            continue
        kind, size = memory.kind, memory.pool.slab_bytes
        own = shared.outcome.samples_of(i)
        lost = 1 - float(own["live"].sum() / own["used"].sum()) if own["used"].any() else 0.0
        rows.append(
            (
                replica.demand.name,
                replica.gpus[0],
                size / 1024,
                size // kind.block_bytes,
                100 * (size % kind.block_bytes) / size,
                100 * lost,
            )
        )
    if rows:
        columns = ("model", "GPU", "slab KiB", "blocks of one", "left over %", "held in vain %")
        caption = (
            "Left over: of a slab, since blocks do not divide it. Held in vain: of held slabs, in the "
            "mean over decisions, what no block of a request lies on."
        )
        yield Table("Slabs", caption, columns, rows, ("", "d", ",.0f", "d", ".2f", ".1f"))


def faster(plan: Plan, shared: Shared, factors: Sequence[float]) -> dict[float, Shared]:
    """The same engines with the requests coming so many times as fast."""
    return {factor: again(plan.request, shared, factor) for factor in factors}


def rates(found: Mapping[float, Shared]) -> Iterator[Item]:
    """Goals met by all models over the rate, their engines standing where they stand."""
    factors = tuple(found)
    series = {
        demand.name: [shared.attainment[i] for shared in found.values()]
        for i, demand in enumerate(found[factors[0]].asked)
    }
    caption = (
        "Share of requests that meet all goals, over the rate as a multiple of that asked for."
    )
    yield Lines("Goals met", caption, factors, series, "× the rate asked for", "share of requests")


def binding(plan: Plan, found: Mapping[float, Shared]) -> Table:
    """Up to which of the rates looked at each model meets its goals, and what it misses above."""
    rows: list[tuple[str, float | None, float | None, str]] = []
    for i, demand in enumerate(plan.request.models):
        held = [f for f, one in found.items() if one.attainment[i] >= demand.attainment]
        above = [f for f in found if not held or f > max(held)]
        name = next(iter(found.values())).asked[i].name
        what = _missed(found[min(above)], i) if above else "nothing"
        rows.append((name, max(held, default=None), min(above, default=None), what))
    caption = (
        "As multiples of the rate asked for. Memory: engines threw out requests for want of blocks; "
        "ttft and tpot: the goal that more of the late requests miss."
    )
    columns = ("model", "goals met up to ×", "missed at ×", "what binds there")
    return Table("What binds first", caption, columns, rows, ("", ".2f", ".2f", ""))


def _missed(shared: Shared, index: int) -> str:
    """Which goal a model's requests miss most, or that memory is short."""
    asked, made = shared.asked[index], shared.outcome
    engines = enumerate(shared.placement.replicas)
    if any(made.preempted[i] for i, one in engines if one.demand.name == asked.name):
        return "memory"
    own = made.requests.model == index
    with np.errstate(invalid="ignore"):
        late = int((~(made.ttft[own] <= asked.ttft)).sum())
        slow = int((made.tpot[own] > asked.tpot).sum())
    return "ttft" if late >= slow else "tpot"
