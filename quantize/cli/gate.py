"""`pq eval --gate`: runs a gate file and shows what it found."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from quantize.cli.common import local_model, pick_device, progress_bar, quiet_libraries
from quantize.cli.told import warnings_told
from quantize.errors import UsageError

if TYPE_CHECKING:
    from quantize.gate.run import GateResult, Verdict

_STYLES = {"pass": "green", "better": "bold cyan", "FAIL": "bold red"}


def print_verdicts(result: GateResult) -> None:
    """Print one row a check on stdout, and below it how many failed and what could be done
    about figures that moved."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(
        "recipe",
        "metric",
        "measured",
        "parent",
        "expected",
        "verdict",
        "",
        box=None,
        pad_edge=False,
    )
    table.title, table.title_justify = Text(_title(result)), "left"
    for column in table.columns[2:5]:
        column.justify = "right"
    for column in table.columns[:6]:
        column.no_wrap = True
    previous = ""
    for verdict in result.verdicts:
        cells = [
            verdict.recipe if verdict.recipe != previous else "",
            verdict.metric,
            _format(verdict.value),
        ]
        cells += [_format(verdict.parent), _demand(verdict)]
        table.add_row(
            *cells,
            Text(verdict.status, style=_STYLES[verdict.status]),
            Text(verdict.detail),
        )
        previous = verdict.recipe
    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = 200  # a pipe has no width; whole lines can be searched
    console.print(table)
    for line in _summary(result):
        console.print(line)


def _title(result: GateResult) -> str:
    first = next(iter(result.figures.values()), None)
    if first is None:
        return result.file
    text = f"{first['protocol']} on {first['data']}, {first['tokens']} tokens"
    return f"{result.file}: {text}, {first['numerics']} numerics"


def _format(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}"


def _demand(verdict: Verdict) -> str:
    if verdict.kind == "recovery":
        return f">= {verdict.expected:g} of parent"
    return f"{verdict.expected:g} ± {verdict.tolerance}"


def _summary(result: GateResult) -> list[str]:
    failed = sum(not verdict.ok for verdict in result.verdicts)
    better = sum(verdict.status == "better" for verdict in result.verdicts)
    checks = len(result.verdicts)
    outcome = f"{failed} of {checks} checks failed" if failed else f"{checks} checks passed"
    lines = [f"{outcome} in {result.seconds:.0f} s"]
    accept = "--update-baselines --reason '...'"
    if better:
        lines.append(f"{better} better than their baseline: keep them with {accept}")
    failures = [verdict for verdict in result.verdicts if not verdict.ok]
    if any(verdict.kind == "value" and verdict.value is not None for verdict in failures):
        lines.append(f"a figure that is meant to be worse is accepted with {accept}")
    return lines


def check_gate(
    file: Path,
    model: str | None,
    baseline: str | None,
    only: list[str],
    reason: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Run the recipes of a gate file and print the verdicts.

    reason: why the measured values shall become the file's; None: they are checked, and GateError is
    raised where one fails.
    """
    from quantize.gate.run import run_gate
    from quantize.gate.update import update_baselines

    quiet_libraries()
    if reason is not None and not reason.strip():
        raise UsageError(
            "--update-baselines: say why with --reason TEXT; it is kept in the file's history",
        )
    with progress_bar() as progress, warnings_told():
        result = run_gate(
            file,
            None if model is None else local_model(model),
            None if baseline is None else local_model(baseline),
            only or None,
            renew=reason is not None,
            device=pick_device(device),
            progress=progress,
        )
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(result) | {"ok": result.ok}, indent=2))
    else:
        print_verdicts(result)
    if reason is None:
        result.raise_if_failed()
    else:
        for change in update_baselines(file, result, reason):
            typer.echo(f"{file}: {change}", err=True)
