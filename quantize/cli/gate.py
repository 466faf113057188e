"""`pq gate`, and `pq eval --gate`: runs a gate file and shows what it found."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from quantize.cli import options
from quantize.cli.common import local_model, pick_device, pick_dtype, quiet_libraries
from quantize.cli.progress import Progress, progress_bar
from quantize.cli.told import warnings_told
from quantize.errors import OutputError, UsageError

if TYPE_CHECKING:
    import torch

    from quantize.evaluation.parents import ParentCache
    from quantize.files.cache import CacheSize
    from quantize.gate.entries import DtypeName
    from quantize.gate.run import GateResult

app = typer.Typer(
    help="Guard accuracy in CI: a file of what models must reach, checked on every change.",
    no_args_is_help=True,
)
_STYLES = {"pass": "green", "better": "bold cyan", "FAIL": "bold red"}

Reason = Annotated[str, typer.Option(help="Why the baselines change; kept in their history.")]
Update = Annotated[
    bool,
    typer.Option("--update-baselines", help="Write the measured values into the gate's file."),
]
Only = Annotated[str | None, typer.Option(help="Entries of the gate to run, separated by commas.")]
Junit = Annotated[Path | None, typer.Option(help="Write the verdicts as JUnit XML.")]
SummaryFile = Annotated[
    Path | None,
    typer.Option(help="Append a table in markdown, for $GITHUB_STEP_SUMMARY."),
]
NoCache = Annotated[
    bool,
    typer.Option("--no-cache", help="Run the parent anew, and keep nothing (see pq gate cache)."),
]


@dataclass(frozen=True)
class Check:
    """How a gate file is to be run, and where its verdicts go."""

    file: Path
    model: str | None = None
    baseline: str | None = None
    only: tuple[str, ...] = ()
    reason: str | None = None
    """Why the measured values shall become the file's; None: they are checked."""
    device: str = "auto"
    junit: Path | None = None
    summary: Path | None = None
    cached: bool = True

    @property
    def accept(self) -> str:
        """The command that makes this run's figures the file's."""
        words = ["pq", "gate", "run", str(self.file)]
        words += ["--model", self.model] if self.model else []
        words += ["--baseline", self.baseline] if self.baseline else []
        words += ["--only", ",".join(self.only)] if self.only else []
        return f"{shlex.join(words)} --update-baselines --reason '...'"


@app.command("run")
def run(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Gate file.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Check this checkpoint alone.")
    ] = None,
    baseline: options.Baseline = None,
    only: Only = None,
    update_baselines: Update = False,
    reason: Reason = "",
    junit: Junit = None,
    summary_file: SummaryFile = None,
    no_cache: NoCache = False,
    device: options.Device = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Check every entry of a gate file against the parent; exit code 9 where one fails."""
    if reason and not update_baselines:
        raise UsageError("--reason belongs to --update-baselines")
    names = tuple(name.strip() for name in (only or "").split(",") if name.strip())
    check = Check(
        file,
        model,
        baseline,
        names,
        reason if update_baselines else None,
        device,
        junit,
        summary_file,
        not no_cache,
    )
    check_gate(check, as_json)


@app.command("init")
def init(
    models: Annotated[
        list[str],
        typer.Argument(metavar="DIR...", help="Checkpoints of any tool, or recipes."),
    ],
    baseline: Annotated[str, typer.Option(help="Their parent: a folder or org/name@REVISION.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")] = Path(
        "gate.yaml"
    ),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file that is there.")
    ] = False,
    errors: Annotated[
        float, typer.Option(min=0, help="Limits, in standard errors of each figure.")
    ] = 3.0,
    protocol: options.ProtocolOption = None,
    dataset: options.Dataset = None,
    text_field: options.TextField = None,
    chat_template: options.ChatTemplate = None,
    seqlen: options.Seqlen = 512,
    context: options.Context = 0,
    max_windows: options.MaxWindows = None,
    bos: options.BosOption = "auto",
    numerics: options.NumericsOption = "kernel",
    no_cache: NoCache = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    as_json: options.AsJson = False,
) -> None:
    """Measure checkpoints and recipes, and write a gate file with what they reach today."""
    options.check_choices(protocol, numerics)
    begins = options.bos_choice(bos)
    if output.exists() and not overwrite:
        raise UsageError(f"{output} exists; give another --output, or --overwrite")
    if not output.parent.is_dir():
        raise OutputError(f"{output.parent}: no such folder; make it, or give another --output")
    from quantize.cli.gate_init import print_first, write_first
    from quantize.gate.entries import Settings

    quiet_libraries()
    place = pick_device(device)
    settings = Settings(
        protocol="rolling" if protocol == "rolling" else "strided",
        dataset=dataset or "builtin",
        text_field=text_field,
        chat_template=chat_template,
        seqlen=seqlen,
        max_windows=max_windows,
        context=context,
        numerics="stock" if numerics == "stock" else "kernel",
        bos=begins,
        dtype=_dtype_name(dtype, place),
    )
    with progress_bar() as progress, warnings_told():
        found = write_first(
            models,
            baseline,
            output,
            errors,
            settings,
            place,
            progress,
            _cache(not no_cache, progress),
        )
    print_first(found, output, as_json)


def _dtype_name(name: str, device: torch.device) -> DtypeName:
    """The name of a dtype in a gate file."""
    from quantize.gate.entries import DtypeName

    kind = str(pick_dtype(name, device)).removeprefix("torch.")
    return next(known for known in get_args(DtypeName) if known == kind)


@app.command("cache")
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove all that is kept.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Say where the parents' runs are kept and how large that is, or remove them."""
    from quantize.files import cache as kept

    folder = kept.cache_folder("parents")
    found = kept.clear(folder) if clear else kept.size_of(folder)
    if as_json:
        facts = {"folder": found.folder, "entries": found.entries, "bytes": found.bytes}
        typer.echo(json.dumps(facts | {"limit": kept.LIMIT_BYTES, "cleared": clear}))
        return
    typer.echo(_cache_line(found, clear, kept.LIMIT_BYTES))


def _cache_line(found: CacheSize, cleared: bool, limit: int) -> str:
    runs = f"{found.entries} run{'' if found.entries == 1 else 's'} of parents"
    size = f"{found.bytes / 1e6:,.1f} MB"
    if cleared:
        return f"{found.folder}: {runs} removed, {size}"
    rest = "the longest unused go first; empty it with pq gate cache --clear"
    return f"{found.folder}: {runs}, {size} of at most {limit / 1e9:,.1f} GB\n{rest}"


def _cache(wanted: bool, progress: Progress) -> ParentCache | None:
    from quantize.evaluation.parents import ParentCache

    return ParentCache(progress=progress) if wanted else None


def print_verdicts(result: GateResult, accept: str) -> None:
    """Print one row a check on stdout, and below it how many failed and what could be done
    about figures that moved."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from quantize.gate.reports import demand

    table = Table(
        "entry",
        "metric",
        "measured",
        "parent",
        "expected",
        "verdict",
        "",
        box=None,
        pad_edge=False,
    )
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
        cells += [_format(verdict.parent), demand(verdict)]
        table.add_row(
            *cells,
            Text(verdict.status, style=_STYLES[verdict.status]),
            Text(verdict.detail),
        )
        previous = verdict.recipe
    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = 200  # a pipe has no width; whole lines can be searched
    for line in (*_title(result), ""):
        console.print(line, style="bold" if line else None)
    console.print(table)
    for line in _summary(result, accept):
        console.print(line)


def _title(result: GateResult) -> list[str]:
    first = next(iter(result.figures.values()), None)
    if first is None:
        return [result.file]
    text = f"{first['protocol']} on {first['data']}, {first['tokens']} tokens"
    return [f"{result.file}: {text}, {first['numerics']} numerics"]


def _format(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}"


def _summary(result: GateResult, accept: str) -> list[str]:
    from quantize.gate.reports import better_line, outcome

    lines = [f"{outcome(result)} in {result.seconds:.0f} s"]
    if notice := better_line(result, accept):
        lines.append(notice)
    failures = [verdict for verdict in result.verdicts if not verdict.ok]
    if any(verdict.kind == "value" and verdict.value is not None for verdict in failures):
        lines.append(f"a figure that is meant to be worse is accepted with {accept}")
    return lines


def check_gate(check: Check, as_json: bool) -> None:
    """Run the entries of a gate file and print the verdicts; GateError where one fails, unless
    they are to become the file's."""
    from quantize.files.disk import report_errors, write_text
    from quantize.gate import reports
    from quantize.gate.run import run_gate
    from quantize.gate.update import update_baselines

    quiet_libraries()
    if check.reason is not None and not check.reason.strip():
        raise UsageError(
            "--update-baselines: say why with --reason TEXT; it is kept in the file's history",
        )
    with progress_bar() as progress, warnings_told():
        result = run_gate(
            check.file,
            None if check.model is None else local_model(check.model),
            None if check.baseline is None else local_model(check.baseline),
            check.only or None,
            renew=check.reason is not None,
            device=pick_device(check.device),
            progress=progress,
            parents=_cache(check.cached, progress),
            locate=local_model,
        )
    if as_json:
        typer.echo(reports.compact(result, check.accept))
    else:
        print_verdicts(result, check.accept)
    if check.junit:
        write_text(check.junit, reports.junit(result, check.accept))
    if check.summary:
        with report_errors(check.summary), check.summary.open("a", encoding="utf-8") as handle:
            handle.write(reports.markdown(result, check.accept))
    if check.reason is None:
        result.raise_if_failed()
    else:
        for change in update_baselines(check.file, result, check.reason):
            typer.echo(f"{check.file}: {change}", err=True)
