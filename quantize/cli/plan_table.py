"""Tables of `pq plan` for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from quantize.cli.common import titled_table
from quantize.cli.inspect import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from quantize.plan.deploy import Plan
    from quantize.plan.latency import Error, Estimate
    from quantize.plan.shared import Shared
    from quantize.plan.sizing import Option

_SHOWN = 6  # options of one model


def _console() -> Console:
    from rich.console import Console

    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = 80
    return console


def print_plan(
    plan: Plan, errors: dict[str, Error], calibrated: bool = False, measured: bool = False
) -> None:
    """What was chosen for each model, what else was looked at, and where engines stand."""
    from quantize.plan.deploy import name_of
    from quantize.plan.shortage import shortages

    console = _console()
    lacks = {lack.name: lack for lack in shortages(plan)}
    for demand in plan.request.models:
        name = name_of(demand)
        found = plan.options[name]
        if found:
            console.print(_memory_table(name, found))
        if any(option.rate is not None for option in found):
            console.print(_rate_table(found, errors))
        for note in found[0].model.notes if found else ():
            console.print(printable(f"note: {note}"))
        if name in plan.chosen:
            console.print(printable(_chosen(name, plan.chosen[name])))
        else:
            lack = lacks[name]
            console.print(printable(f"short of {lack.short}: {lack.by}"))
            for remedy in lack.remedies:
                console.print(printable(f"  would do: {remedy}"))
        console.print()
    if plan.engines:
        _print_places(console, plan)
    if plan.shared is not None:
        console.print(_shared_table(plan, errors))
        console.print(_sharing(plan, plan.shared))
    if measured:
        console.print("Times of steps are those of the profile.")
    else:
        console.print(_about(errors, calibrated))


def _memory_table(name: str, options: Sequence[Option]) -> Table:
    longest = max((option.fit.context for option in options), default=0)
    table = titled_table(
        printable(f"{name}: what one engine holds of {longest:,} tokens a sequence")
    )
    for column in ("GPUs", "weights", "KV cache", "tokens", "sequences", "TPOT, ms"):
        table.add_column(column, justify="left" if column == "GPUs" else "right", no_wrap=True)
    for option in options[:_SHOWN]:
        memory = option.fit.memory
        cells = [f"{option.tp} x {option.gpu.name}", _gb(memory.weights), _gb(memory.kv)]
        if option.refused:
            cells += ["-", "-", "-"]
        else:
            cells += [
                f"{option.fit.kv_tokens:,}",
                f"{option.together:,}",
                f"{1e3 * option.alone:.1f}-{1e3 * _tpot_of_all(option):.0f}",
            ]
        table.add_row(*cells)
    for option in options[:_SHOWN]:
        if option.refused:
            table.caption = f"{option.tp} x {option.gpu.name}: {option.refused}"
    table.caption_justify = "left"
    return table


def _tpot_of_all(option: Option) -> float:
    from quantize.plan.sizing import tpot_at

    return tpot_at(option, option.together)


def _rate_table(options: Sequence[Option], errors: dict[str, Error]) -> Table:
    demand = options[0].demand
    what = demand.trace or f"{demand.rate:g} requests a second"
    goals = [f"TTFT {demand.ttft:g} s"] if demand.ttft else []
    goals += [f"TPOT {1e3 * demand.tpot:g} ms"] if demand.tpot else []
    title = f"engines for {what}" + (f", {' and '.join(goals)}" if goals else "")
    table = titled_table(printable(title))
    share = f"TTFT p{100 * demand.attainment:.0f}"
    for column in ("engines", "rate of 1", "bound by", share, "TPOT, ms", "met"):
        table.add_column(column, justify="left" if column == "engines" else "right", no_wrap=True)
    for option in options[:_SHOWN]:
        if option.refused:
            continue
        engines = f"{option.replicas or '>' + str(max(0, option.wanted - 1))} of {option.tp}"
        row = [engines, f"{option.rate:.3g}/s" if option.rate else "0", option.binds]
        if option.state is not None and option.replicas:
            row.append(_seconds(errors["ttft"].around(option.state.ttft_share)))
            row.append(_milliseconds(errors["tpot"].around(option.state.tpot)))
        else:
            row += ["-", "-"]
        row.append(f"{option.simulated.attainment:.1%}" if option.simulated else "-")
        table.add_row(*row)
    return table


def _chosen(name: str, option: Option) -> str:
    memory = option.fit.memory
    engines = f"{option.replicas} engine{'s' * (option.replicas > 1)}"
    spent = (
        f"of {_gb(memory.total)}: {_gb(memory.weights)} weights, {_gb(memory.activations)} "
        f"activations, {_gb(memory.overhead)} graphs and CUDA, {_gb(memory.kv)} KV cache"
    )
    each = "GPU" if option.tp == 1 else "GPUs"
    return f"{name}: {engines} of {option.tp} {option.gpu.name} {each}; a GPU {spent}"


def _shared_table(plan: Plan, errors: dict[str, Error]) -> Table:
    """What became of each model's requests; times are those that the share asked for stays below."""
    import numpy as np

    table = titled_table("requests simulated together")
    for column in ("model", "TTFT", "TPOT, ms", "tokens/s", "cached", "met"):
        table.add_column(column, justify="left" if column == "model" else "right", overflow="fold")
    for name, option in plan.chosen.items():
        if (found := option.simulated) is None:
            continue
        made, share = found.outcome, option.demand.attainment
        done = ~np.isnan(made.finish)
        ttft, tpot = (
            float(np.quantile(values[done], share)) if done.any() else float("nan")
            for values in (made.ttft, made.tpot)
        )
        table.add_row(
            printable(name),
            f"p{100 * share:.0f} {_seconds(errors['ttft'].around(ttft))}",
            _milliseconds(errors["tpot"].around(tpot)),
            f"{found.tokens_per_second:,.0f}",
            f"{made.hit_rate:.0%}" if any(made.found) else "-",
            f"{found.attainment:.1%}",
        )
    return table


def _sharing(plan: Plan, shared: Shared) -> str:
    """What sharing brings, and how it was reckoned."""
    from quantize.plan.shared import WHOLE

    alone = "more than there are" if shared.alone is None else str(shared.alone)
    least = min(shared.attainment)
    assert plan.request.sharing is not None
    how = plan.request.sharing
    return (
        f"Shared: {plan.gpus} GPU{'s' * (plan.gpus > 1)}; with GPUs of their own the same models take "
        f"{alone}. Goals met by {least:.1%} of requests, least of all models, simulated together: "
        f"engines of one GPU take turns. Placement {how.placement}, memory {how.memory}, order "
        f"{how.policy}." + (f" {WHOLE}" if shared.whole else "")
    )


def _print_places(console: Console, plan: Plan) -> None:
    from quantize.plan.emit import node_name

    table = titled_table(f"{plan.gpus} GPU{'s' * (plan.gpus != 1)} in use")
    for column in ("node", "GPUs", "model"):
        table.add_column(column)
    for engine in sorted(plan.engines, key=lambda e: (e.nodes, e.node, e.gpus))[:32]:
        gpus = ", ".join(map(str, engine.gpus))
        table.add_row(node_name(plan, engine), gpus, printable(engine.name))
    if len(plan.engines) > 32:
        table.add_row("…", "", f"{len(plan.engines) - 32} more")
    console.print(table)


def print_comparison(plans: Sequence[Plan]) -> None:
    """GPUs that several checkpoints take for the same work, and what each saves beside the first."""
    from quantize.plan.deploy import name_of

    console = _console()
    table = titled_table("the same work with other checkpoints")
    for column in ("model", "weights", "KV/token", "engines", "GPUs", "saved"):
        table.add_column(column, justify="left" if column == "model" else "right", overflow="fold")
    base = plans[0].gpus if plans[0].feasible else None
    for plan in plans:
        name = name_of(plan.request.models[0])
        option = plan.chosen.get(name)
        model = plan.options[name][0].model
        kept = f"{model.kv_bytes_per_token() / 1024:.1f} KiB"
        cells = [printable(name), _gb(model.weights()), kept]
        if option is None:
            cells += ["-", "none", "-"]
        else:
            saved = "-" if base is None or plan is plans[0] else f"{base - plan.gpus:+d}"
            cells += [f"{option.replicas} of {option.tp}", str(plan.gpus), saved]
        table.add_row(*cells)
    console.print(table)


def _about(errors: dict[str, Error], calibrated: bool) -> str:
    tpot, ttft = errors["tpot"], errors["ttft"]
    spread = (
        f"TPOT {tpot.low - 1:+.0%} to {tpot.high - 1:+.0%}, "
        f"TTFT {ttft.low - 1:+.0%} to {ttft.high - 1:+.0%}"
    )
    if calibrated:
        return f"Latency calibrated by the runs given; they are within {spread} of it."
    return (
        f"Latency is not calibrated: four of five measurements of vLLM fell within {spread} of "
        "what is said here. --calibrate narrows it."
    )


def _gb(size: float) -> str:
    if abs(size) < 1e8:
        return f"{size / 1e6:.1f} MB"
    return f"{size / 1e9:.1f} GB" if abs(size) < 1e12 else f"{size / 1e12:.2f} TB"


def _seconds(found: Estimate) -> str:
    return f"{found.mid:.2f} ({found.low:.2f}-{found.high:.2f})"


def _milliseconds(found: Estimate) -> str:
    return f"{1e3 * found.mid:.1f} ({1e3 * found.low:.1f}-{1e3 * found.high:.1f})"
