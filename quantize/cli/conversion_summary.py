"""What `pq convert` says at its end: what was done, how good it is, and what to type next."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from quantize.cli.again import again
from quantize.cli.figures import print_restructuring
from quantize.cli.inspect import loads_line
from quantize.cost.units import duration, gigabytes

if TYPE_CHECKING:
    from rich.console import Console

    from quantize.conversion.loop import Summary

_FINE = 0.01
"""Divergence below which nobody need look for more: hard to tell from the parent."""


@dataclass(frozen=True)
class NextSteps:
    """Commands that may follow, each as it can be typed."""

    serve: list[str]
    """For the engine that serves best of those that load the output."""
    evaluate: str
    report: str
    better: list[str]
    """For less error: the same conversion, with more bits where it lost most, or another recipe."""

    def as_json(self) -> dict[str, Any]:
        """All of them."""
        return dataclasses.asdict(self)


def next_steps(ctx: typer.Context, summary: Summary) -> NextSteps:
    """What may follow the conversion that this invocation made."""
    from quantize.cli.serve_check import serve_commands

    output, params = summary.output, ctx.params
    name = shlex.quote(output)
    revision = f"@{params['revision']}" if params.get("revision") else ""
    parent = shlex.quote(f"{params['model']}{revision}")
    started = serve_commands(output, Path(output))
    # Lines of Python are no command: serve-check prints them.
    servers = [lines for lines in started.values() if len(lines) == 1]
    return NextSteps(
        serve=servers[0] if servers else [f"pq serve-check {name}"],
        evaluate=f"pq eval {name} --baseline {parent}",
        report=f"pq report {name}",
        better=_better(ctx, summary),
    )


def _better(ctx: typer.Context, summary: Summary) -> list[str]:
    worst, output = summary.hurt_most, summary.output.rstrip("/")
    if worst is None:
        return []
    commands = []
    if worst["recipe"]:
        changed = f"{output}-{worst['recipe']}"
        commands.append(again(ctx, recipe=worst["recipe"], output=changed))
    if worst["target_bpw"]:
        target = worst["target_bpw"]
        changed = f"{output}-{target:g}bpw"
        commands.append(again(ctx, target_bpw=f"{target:g}", output=changed))
    if worst["ignore"]:
        field = f"{worst['method']}.ignore={','.join(worst['ignore'])}"
        commands.append(again(ctx, assignments=[field], output=f"{output}-mixed"))
    return commands


def _megabytes(summary: Summary) -> str:
    return f"{summary.output_bytes / 1e6:.1f} MB (source {summary.source_bytes / 1e6:.1f} MB)"


def _list_names(names: Sequence[str], shown: int = 7) -> str:
    rest = f" and {len(names) - shown} more, all in pq.json" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest


def print_summary(summary: Summary, steps: NextSteps) -> None:
    """What was done, how good it is, and what to do next, on stderr."""
    from rich.console import Console

    console = Console(stderr=True)
    ratio = summary.source_bytes / summary.output_bytes
    size = (
        f"{summary.output_bytes / 1e6:.1f} MB ({ratio:.2f}x smaller)"
        if ratio >= 1.005
        else _megabytes(summary)
    )
    bits = f"{summary.quantized_linears} linears at {summary.bits_per_weight:.3f} bits per weight, "
    done = bits if summary.quantized_linears else ""
    memory = f", peak memory {gigabytes(summary.peak_bytes)}" if summary.peak_bytes else ""
    took = f"{duration(summary.seconds)} ({duration(summary.seconds_per_block)} a block)"
    console.print(f"[bold]{summary.output}[/bold]: {done}{size}, {took}{memory}")
    if summary.dequantized:
        console.print(f"the source is stored small: {summary.dequantized}")
    if summary.bos:
        console.print(f"calibration windows began with BOS (token {summary.bos_token_id})")
    if summary.restructured:
        print_restructuring(console, summary.restructured, summary.activated_reduction)
    for reason, names in summary.cache_16bit.items():
        console.print(
            f"[yellow]{len(names)} layers keep a 16-bit cache[/yellow] ({reason}): "
            f"{_list_names(names)}"
        )
    for reason, names in summary.equal_tokens.items():
        console.print(
            f"in {len(names)} layers all tokens count the same ({reason}): {_list_names(names)}"
        )
    for reason, names in summary.unmoved.items():
        console.print(f"in {len(names)} blocks no scales move over {reason}")
    for adapted in summary.adapted:
        console.print(f"[yellow]not as asked for:[/yellow] {adapted}")
    for lost in summary.lost:
        console.print(f"[yellow]not in this format:[/yellow] {lost}")
    for unserved in summary.unserved:
        where, _, what = unserved.partition(": ")
        console.print(f"[yellow]{where}:[/yellow] {what}")
    console.print(f"{loads_line(Path(summary.output))} (pq serve-check says how)", soft_wrap=True)
    if summary.carried:
        modules = (
            f"{name} ({count} tensor{'s' if count > 1 else ''})"
            for name, count in summary.carried.items()
        )
        console.print(f"carried over unchanged, beside the decoder: {', '.join(modules)}")
    if summary.untied_head_bytes:
        console.print(
            "the head no longer shares the embedding's weight: "
            f"{summary.untied_head_bytes / 1e6:.1f} MB more"
        )
    if summary.promoted:
        console.print(
            f"{len(summary.promoted)} linears got more bits to spend the target: "
            f"{_list_names(summary.promoted)}"
        )
    if summary.fallbacks:
        console.print(
            f"[yellow]{len(summary.fallbacks)} linears were not fitted to their inputs[/yellow] "
            f"(pq.json says why): {_list_names(summary.fallbacks)}"
        )
    _print_quality(console, summary)
    _print_steps(console, summary, steps)


def _print_quality(console: Console, summary: Summary) -> None:
    """How far the output is from its parent, and where it lost most."""
    from quantize.evaluation.held_out import sentence

    found = summary.held_out
    if found is not None:
        told = sentence(found)
        colour = "[yellow]quality:[/yellow]" if "not_measured" in found else "[bold]quality:[/bold]"
        console.print(f"{colour} {told.removeprefix('quality was ')}")
        if "not_measured" not in found:
            console.print(
                f"  a look at {found['windows']} windows of {found['seqlen']} ({found['text']}): "
                f"{found['measured']}",
                markup=False,
            )
    if worst := summary.hurt_most:
        console.print(
            f"lost most: {worst['name']}, relative {worst['error'].replace('_', ' ')} "
            f"{worst['value']:.2g} (median {worst['median']:.2g})",
            markup=False,
        )


def _print_steps(console: Console, summary: Summary, steps: NextSteps) -> None:
    """Commands, each on a line of its own that can be copied."""
    found = summary.held_out or {}
    shown = {"next": [*steps.serve, steps.evaluate, steps.report]}
    if found.get("kld_mean", _FINE) >= _FINE and steps.better:
        shown["for less error"] = steps.better
    for title, commands in shown.items():
        console.print(f"{title}:", markup=False)
        for command in commands:
            console.print(f"  {command}", markup=False, highlight=False, soft_wrap=True)
