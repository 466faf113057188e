"""A plan as a page: GPUs and what lies on them, goals over the rate, memory over time, what binds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from quantize.pictures import Bars, Histogram, Lines, Picture, Table
from quantize.plan.deploy import Plan, name_of
from quantize.plan.latency import ERRORS, Error
from quantize.plan.shared import WHOLE, Shared
from quantize.plan.shortage import shortages
from quantize.plan.simulate.run import Outcome
from quantize.plan.simulated import Simulated, simulate_engines, stream_of
from quantize.plan.sizing import Option
from quantize.report import plan_shared
from quantize.report.model import Group, Headline, Item, Note, Report, Section

_GIB = 2**30
_GPUS = 24
"""Drawn at most; others are like them."""
_FACTORS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)
"""Of the rate asked for, at which goals are simulated."""
_MOMENTS = 160
_BINS = 32


def plan_report(plan: Plan, version: str, errors: Mapping[str, Error] = ERRORS) -> Report:
    """Make the page's data; goals over the rate are simulated here, a second or so for a model."""
    names = [name_of(demand) for demand in plan.request.models]
    faster: Mapping[float, Shared] = {}
    if plan.shared is not None:
        faster = plan_shared.faster(plan, plan.shared, _FACTORS)
    kinds = ", ".join(sorted({option.gpu.name for option in plan.chosen.values()}))
    headlines = [
        Headline("GPUs", str(plan.gpus), kinds or "none", float(plan.gpus)),
        Headline("Models", str(len(plan.chosen)), f"of {len(names)} asked for", len(plan.chosen)),
    ]
    met = [o.simulated.attainment for o in plan.chosen.values() if o.simulated is not None]
    if met:
        headlines.append(
            Headline("Goals met", f"{min(met):.1%}", "of requests, least of all models", min(met))
        )
    short = shortages(plan)
    warnings = [
        f"{s.name}: short of {s.short}, {s.by}. Nearest change: {'; '.join(s.remedies) or 'none'}."
        for s in short
    ]
    if plan.shared is not None and plan.shared.whole:
        warnings.append(WHOLE)
    sections = [
        Section(
            "gpus",
            "GPUs",
            "What lies on each GPU in use, of all its memory."
            + ("" if plan.shared else " KV blocks are what the engine cuts the rest into."),
            [*_gpus(plan), *_slabs(plan), _table(plan)],
        ),
        Section(
            "goals",
            "Goals over the rate",
            "The same engines, with the same requests coming slower or faster.",
            list(plan_shared.rates(faster) if faster else _rates(plan)),
        ),
        Section(
            "time",
            "Over time",
            "Simulated at the rate asked for.",
            list(_times(plan)),
        ),
        Section(
            "latency",
            "Latency",
            "Of all requests answered in the simulation. "
            + "; ".join(
                f"{name.upper()}: four of five measurements of the kind the model was tested on lie "
                f"between {e.low:.2f} and {e.high:.2f} of its figure"
                for name, e in errors.items()
            )
            + ".",
            list(_latencies(plan)),
        ),
        Section("binds", "What binds", *_binds(plan, faster)),
    ]
    title = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
    subtitle = "meets its goals" if plan.feasible else "does not meet all goals"
    kept = [section for section in sections if section.items]
    return Report(title, subtitle, version, headlines, "", warnings, kept, "Deployment plan")


def _slabs(plan: Plan) -> Iterator[Picture]:
    if plan.shared is not None:
        yield from plan_shared.slabs(plan.shared)


def _gpus(plan: Plan) -> Iterator[Picture]:
    if plan.shared is not None:
        yield from plan_shared.gpus(plan.shared)
        return
    drawn: dict[str, list[float]] = {}
    places: list[str] = []
    for engine in plan.engines:
        memory = plan.chosen[engine.name].fit.memory
        for gpu in engine.gpus:
            if len(places) == _GPUS:
                break
            places.append(f"{engine.nodes}.{engine.node}.{gpu} {engine.name}")
            parts = {
                "weights": memory.weights,
                "activations": memory.activations,
                "CUDA, graphs": memory.overhead,
                "KV blocks": memory.kv,
                "left to others": memory.total - memory.budget,
            }
            for name, size in parts.items():
                drawn.setdefault(name, []).append(size / _GIB)
    if places:
        more = plan.gpus - len(places)
        caption = "Entry of the cluster, node, GPU and the engine on it."
        caption += f" {more} more are like them." if more else ""
        yield Bars("Memory of each GPU", caption, places, drawn, "GiB", stacked=True)


def _table(plan: Plan) -> Table:
    columns = (
        "model",
        "engines",
        "tp",
        "weights GiB",
        "KV GiB",
        "KV tokens",
        "sequences",
        "KV B/token",
    )
    rows = [
        (
            name,
            option.replicas,
            option.tp,
            option.fit.memory.weights / _GIB,
            option.fit.memory.kv / _GIB,
            option.fit.kv_tokens,
            option.fit.sequences,
            option.model.kv_bytes_per_token(option.tp),
        )
        for name, option in plan.chosen.items()
    ]
    caption = "Bytes are of one GPU; tokens and sequences of one engine, at the full context."
    formats = ("", "d", "d", ",.2f", ",.2f", ",d", ",d", ",.0f")
    return Table("Engines", caption, columns, rows, formats)


def _simulated(plan: Plan) -> Iterator[tuple[str, Option, Simulated]]:
    for name, option in plan.chosen.items():
        if option.simulated is not None:
            yield name, option, option.simulated


def _rates(plan: Plan) -> Iterator[Item]:
    series: dict[str, list[float | None]] = {}
    for name, option, _ in _simulated(plan):
        stream = stream_of(option.demand)
        if stream is None or not stream.rate:
            continue
        series[name] = [
            simulate_engines(
                option.step,
                option.engine,
                option.fit.blocks,
                stream.at_rate(stream.rate * factor),
                option.demand,
                option.replicas,
            ).attainment
            for factor in _FACTORS
        ]
    if series:
        caption = (
            "Share of requests that meet all goals, over the rate as a multiple of that asked for."
        )
        yield Lines(
            "Goals met", caption, _FACTORS, series, "× the rate asked for", "share of requests"
        )
    else:
        yield Note("Nothing was simulated: give a rate or a trace, and a goal of TTFT or TPOT.")


def _times(plan: Plan) -> Iterator[Item]:
    if plan.shared is not None:
        yield from plan_shared.memory(plan.shared)
    for name, option, simulated in _simulated(plan):
        outcome = _sampled(option, simulated)
        end = outcome.seconds
        if not end:
            continue
        moments = np.linspace(0.0, end, _MOMENTS)
        capacity = max(1, option.fit.blocks.count) * option.replicas
        full = sum(groups for window, groups in option.fit.blocks.groups if window is None) or 1
        used, running, waiting = (
            _over(outcome, moments, option.replicas, field)
            for field in ("used", "running", "waiting")
        )
        requests = Lines(
            "Requests",
            "Computed, and waiting to be.",
            moments.tolist(),
            {"running": running.tolist(), "waiting": waiting.tolist()},
            "seconds",
            "requests",
        )
        if plan.shared is not None:  # its memory is drawn by GPU
            yield Group(name, "All its engines together.", [requests])
            continue
        yield Group(
            name,
            "All its engines together.",
            [
                Lines(
                    "KV memory",
                    "Blocks in use, of all.",
                    moments.tolist(),
                    {"in use": (used * full / capacity).tolist()},
                    "seconds",
                    "share of blocks",
                ),
                requests,
            ],
        )


def _sampled(option: Option, simulated: Simulated) -> Outcome:
    """The outcome with its states over time, for which equal engines serve the stream once more."""
    if len(simulated.outcome.rows):
        return simulated.outcome
    stream = simulated.outcome.requests
    parts = option.step, option.engine, option.fit.blocks, stream, option.demand, option.replicas
    return simulate_engines(*parts, samples=True).outcome


def _over(
    outcome: Outcome, moments: NDArray[np.float64], engines: int, field: str
) -> NDArray[np.float64]:
    """The sum over engines of what each last said of itself before each moment."""
    total = np.zeros(len(moments))
    for engine in range(engines):
        own = outcome.samples_of(engine)
        total += plan_shared.steps(own["time"], own[field], moments)
    return total


def _latencies(plan: Plan) -> Iterator[Item]:
    for name, option, simulated in _simulated(plan):
        made, demand = simulated.outcome, option.demand
        done = ~np.isnan(made.finish)
        pictures = [
            _histogram("TTFT", made.ttft[done], demand.ttft),
            _histogram("TPOT", made.tpot[done & (made.requests.output > 1)], demand.tpot),
        ]
        found = [picture for picture in pictures if picture is not None]
        if found:
            yield Group(name, "The dashed line is the goal.", found)


def _histogram(name: str, values: NDArray[np.float64], goal: float | None) -> Histogram | None:
    if not len(values):
        return None
    scale, unit = (1e3, "ms") if float(np.median(values)) < 1.0 else (1.0, "s")
    far = (
        float(np.quantile(values, 0.995))
        if goal is None
        else max(float(np.quantile(values, 0.995)), goal * 1.05)
    )
    inside = values[values <= far]
    counts, edges = np.histogram(inside * scale, bins=_BINS, range=(0.0, max(far * scale, 1e-9)))
    points = [] if goal is None else [goal * scale]
    beyond = len(values) - len(inside)
    caption = f"{beyond} of {len(values)} lie beyond the right edge." if beyond else ""
    return Histogram(name, caption, edges.tolist(), counts.tolist(), points, unit, "requests")


def _binds(plan: Plan, faster: Mapping[float, Shared]) -> tuple[str, list[Item]]:
    if faster:
        what = "What is missed first where requests come faster than asked for."
        return what, [plan_shared.binding(plan, faster)]
    return "Every way to run each model.", [_options(plan)]


def _options(plan: Plan) -> Table:
    columns = ("model", "GPU", "tp", "engines", "GPUs", "req/s of one", "what binds", "chosen")
    rows = [
        (
            name,
            option.gpu.name,
            option.tp,
            option.replicas or None,
            option.gpus or None,
            option.rate,
            option.refused or option.binds,
            "yes" if option is plan.chosen.get(name) else "",
        )
        for name, options in plan.options.items()
        for option in options
    ]
    caption = "What one engine has too little of to take more, or why it does not run."
    return Table("Options", caption, columns, rows, ("", "", "d", "d", "d", ",.2f", "", ""))
