"""How `pq eval --gate` shows what it found."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
