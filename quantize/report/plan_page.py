"""A plan as a page: GPUs with what fills them, what binds, goals over rates, latency, memory over time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

import quantize
from quantize.pictures import Bars, Histogram, Lines, Table
from quantize.plan.deploy import Engines, Plan, name_of
from quantize.plan.latency import Error
from quantize.plan.shortage import shortages
from quantize.plan.simulated import share_of, simulate_engines, stream_of
from quantize.plan.sizing import tpot_at
from quantize.report.model import Group, Headline, Item, Note, Report, Section

_FACTORS = (0.5, 0.75, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0)
"""Of the rate that is asked for, at which goals are simulated."""
_GPUS = 64
"""Drawn at most."""
_POINTS = 200
"""Of a curve over time."""


def plan_report(plan: Plan, errors: Mapping[str, Error], calibrated: bool = False) -> Report:
    """The page of a plan. errors: of the latency model. Goals over rates are simulated here, which
    takes seconds."""
    names = [name_of(demand) for demand in plan.request.models]
    return Report(
        name=", ".join(names),
        subtitle=_cluster(plan),
        pq=quantize.__version__,
        headlines=list(_headlines(plan, errors)),
        basis="",
        warnings=[*_lacks(plan), *_notes(plan)],
        sections=[s for s in _sections(plan, errors, calibrated) if s.items],
        heading="Deployment plan",
    )


def _cluster(plan: Plan) -> str:
    kinds = [f"{n.nodes} x {n.gpus} {n.kind.name}" for n in plan.request.cluster]
    return f"on {', '.join(kinds)}"


def _headlines(plan: Plan, errors: Mapping[str, Error]) -> Iterator[Headline]:
    there = sum(nodes.gpus * nodes.nodes for nodes in plan.request.cluster)
    yield Headline("GPUs in use", str(plan.gpus), f"of {there}", plan.gpus)
    for name, option in list(plan.chosen.items())[:3]:
        detail = f"{option.replicas} engines of {option.tp} {option.gpu.name}"
        if option.simulated is not None:
            share = option.simulated.attainment
            yield Headline(f"{name}: goals met", f"{share:.1%}", detail, share)
        elif option.state is not None:
            found = errors["tpot"].around(option.state.tpot)
            spread = f"{1e3 * found.low:.1f} to {1e3 * found.high:.1f} ms; {detail}"
            yield Headline(f"{name}: TPOT", f"{1e3 * found.mid:.1f} ms", spread, found.mid)
        else:
            tokens = option.fit.kv_tokens
            yield Headline(f"{name}: KV cache", f"{tokens:,} tokens", detail, tokens)


def _lacks(plan: Plan) -> list[str]:
    return [
        f"{lack.name} is short of {lack.short}: {lack.by}. Would do: {'; or '.join(lack.remedies)}."
        for lack in shortages(plan)
    ]


def _notes(plan: Plan) -> list[str]:
    return [f"{n}: {note}" for n, o in plan.chosen.items() for note in o.model.notes]


def _sections(plan: Plan, errors: Mapping[str, Error], calibrated: bool) -> Iterator[Section]:
    yield Section("gpus", "GPUs", "What fills the memory of each GPU in use.", list(_gpus(plan)))
    lead = "Every width of engine that was looked at, and what one of it has too little of first."
    yield Section("binds", "What binds", lead, list(_options(plan)))
    lead = "Share of requests that meet all goals in the simulator, by the rate they come at."
    yield Section("goals", "Goals over rate", lead, list(_goals(plan)))
    lead = "Of the simulated requests, as said: without the error of the latency model."
    yield Section("latency", "Latency", lead, list(_latency(plan)))
    lead = "KV cache in use and sequences while the requests are served."
    yield Section("time", "Memory over time", lead, list(_over_time(plan)))
    lead = (
        "Measured over said, 10th to 90th percentile."
        if not calibrated
        else "Measured over said, over the runs that it was calibrated by."
    )
    rows = [[name.upper(), e.low, e.high, e.median, e.mean] for name, e in errors.items()]
    columns = ("figure", "low", "high", "median error", "mean error")
    table = Table("Latency model", "Errors are of |said − measured| / measured.", columns, rows)
    yield Section("error", "How far it errs", lead, [table])


def _gpus(plan: Plan) -> Iterator[Item]:
    engines = sorted(plan.engines, key=lambda e: (e.nodes, e.node, e.gpus))
    places = [(engine, gpu) for engine in engines for gpu in engine.gpus][:_GPUS]
    if not places:
        return
    series: dict[str, list[float]] = {
        key: [] for key in ("weights", "activations", "engine", "KV cache", "left")
    }
    for engine, _ in places:
        memory = plan.chosen[engine.name].fit.memory
        for key, size in zip(
            series,
            (
                memory.weights,
                memory.activations,
                memory.overhead,
                memory.kv,
                memory.total - memory.budget,
            ),
            strict=True,
        ):
            series[key].append(size / 1e9)
    labels = [f"{_node(plan, engine)}:{gpu}" for engine, gpu in places]
    caption = "The KV cache's blocks are cut from one pool; what is left is not the engine's."
    yield Bars("Memory by GPU", caption, labels, series, y_label="GB", stacked=True)
    rows = [
        [_node(plan, e), ", ".join(map(str, e.gpus)), e.name, plan.chosen[e.name].fit.sequences]
        for e in engines
    ]
    caption = "Sequences of the full context that fit its KV cache."
    yield Table("Engines", caption, ("node", "GPUs", "model", "sequences"), rows)


def _node(plan: Plan, engine: Engines) -> str:
    return f"{plan.request.cluster[engine.nodes].kind.name}-{engine.node}"


def _options(plan: Plan) -> Iterator[Item]:
    columns = (
        "engine", "weights, GB", "KV cache, GB", "KV tokens", "TPOT of 1, ms", "of all, ms",
        "rate of one", "bound by", "engines", "GPUs",
    )  # fmt: skip
    for name, options in plan.options.items():
        rows = []
        for option in options:
            memory = option.fit.memory
            row: list[str | float | int | None] = [f"{option.tp} x {option.gpu.name}"]
            row += [memory.weights / 1e9, memory.kv / 1e9]
            if option.refused:
                row += [None, None, None, None, option.refused, None, None]
            else:
                full = tpot_at(option, option.together)
                row += [option.fit.kv_tokens, 1e3 * option.alone, 1e3 * full, option.rate]
                row += [option.binds, option.replicas, option.gpus]
            rows.append(row)
        yield Table(name, "A GPU's share of weights and cache.", columns, rows)


def _goals(plan: Plan) -> Iterator[Item]:
    for name, option in plan.chosen.items():
        demand, stream = option.demand, stream_of(option.demand)
        if option.simulated is None or stream is None:
            continue
        rate = stream.rate
        met, tokens = [], []
        for factor in _FACTORS:
            found = simulate_engines(
                option.step,
                option.engine,
                option.fit.blocks,
                stream.at_rate(rate * factor),
                demand,
                option.replicas,
            )
            met.append(100 * found.attainment)
            tokens.append(found.tokens_per_second)
        rates = [rate * factor for factor in _FACTORS]
        goal = [100 * demand.attainment] * len(rates)
        caption = (
            f"{option.replicas} engines of {option.tp} {option.gpu.name}; {rate:.3g}/s is asked."
        )
        yield Group(
            name,
            caption,
            [
                Lines(
                    "Goals met", "", rates, {"met": met, "asked": goal}, "requests a second", "%"
                ),
                Lines("Output", "", rates, {"tokens": tokens}, "requests a second", "tokens/s"),
            ],
        )


def _latency(plan: Plan) -> Iterator[Item]:
    for name, option in plan.chosen.items():
        if option.simulated is None:
            continue
        outcome = option.simulated.outcome
        done = ~np.isnan(outcome.finish)
        goals = (option.demand.ttft, option.demand.tpot)
        pictures = [
            _histogram(title, values[done], goal, scale, unit)
            for title, values, goal, scale, unit in (
                ("TTFT", outcome.ttft, goals[0], 1.0, "s"),
                ("TPOT", outcome.tpot, goals[1], 1e3, "ms"),
            )
            if done.any()
        ]
        yield Group(name, "The line marks the goal.", pictures)


def _histogram(
    title: str, values: np.ndarray, goal: float | None, scale: float, unit: str
) -> Histogram:
    top = max(float(np.quantile(values, 0.995)), 1.05 * (goal or 0.0))
    counts, edges = np.histogram(np.minimum(values, top) * scale, bins=40, range=(0, top * scale))
    points = [goal * scale] if goal else []
    return Histogram(title, "", edges.tolist(), counts.tolist(), points, unit, "requests")


def _over_time(plan: Plan) -> Iterator[Item]:
    for name, option in plan.chosen.items():
        if option.simulated is None:
            continue
        samples = [s for s in option.simulated.outcome.samples if s.engine == 0]
        if len(samples) < 2:
            continue
        chosen = samples[:: max(1, len(samples) // _POINTS)]
        capacity = max(1.0, share_of(option.fit.blocks, option.fit.context).capacity)
        seconds = [s.time for s in chosen]
        running: Sequence[float] = [s.running for s in chosen]
        used = [100 * s.used / capacity if math.isfinite(s.used) else None for s in chosen]
        waiting = [s.waiting for s in chosen]
        yield Group(
            name,
            "The first engine.",
            [
                Lines("KV cache in use", "", seconds, {"used": used}, "seconds", "%"),
                Lines(
                    "Sequences",
                    "",
                    seconds,
                    {"running": running, "waiting": waiting},
                    "seconds",
                ),
            ],
        )
    if not any(option.simulated for option in plan.chosen.values()):
        yield Note("Nothing was simulated: that takes a rate or a trace, and a goal.")
