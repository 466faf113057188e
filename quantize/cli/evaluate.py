"""`pq eval`: perplexity, and divergence from the parent."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantize.cli.common import local_model, pick_device, pick_dtype, progress_bar, quiet_libraries
from quantize.errors import UsageError

if TYPE_CHECKING:
    from quantize.evaluate import Evaluation


def evaluate(
    model: Annotated[str, typer.Argument(help="Packed or plain model folder.")],
    baseline: Annotated[str | None, typer.Option(help="Its parent, run in the same pass.")] = None,
    dataset: Annotated[str, typer.Option(help="Text: builtin (held-out part), a file, or a Hub set.")] = "builtin",
    seqlen: Annotated[int, typer.Option(min=8, help="Window length in tokens.")] = 512,
    max_windows: Annotated[int | None, typer.Option(min=1, help="Evaluate only the first windows.")] = None,
    numerics: Annotated[
        str, typer.Option(help="kernel: emulate the INT4xFP8 kernel; stock: compute as transformers loads it.")
    ] = "kernel",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, …")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON on stdout.")] = False,
) -> None:
    """Measure a model on text that calibration never saw."""
    if numerics not in ("kernel", "stock"):
        raise UsageError(f"--numerics {numerics}: choose kernel or stock")
    from quantize.evaluate import evaluate as run

    quiet_libraries()
    place = pick_device(device)
    with progress_bar() as progress:
        result = run(
            local_model(model),
            None if baseline is None else local_model(baseline),
            dataset=dataset,
            seqlen=seqlen,
            max_windows=max_windows,
            device=place,
            dtype=pick_dtype(dtype, place),
            numerics="kernel" if numerics == "kernel" else "stock",
            progress=progress,
        )
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(result), indent=2))
    else:
        _print(result, Path(model).name)


def _print(result: Evaluation, name: str) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"{name}: {result.protocol} on {result.data}, {result.tokens} tokens, {result.numerics} numerics"
    table = Table(title=title, title_justify="left")
    for column in ("", "perplexity", "KLD mean", "KLD p99", "same top-1", "bits/weight"):
        table.add_column(column, justify="left" if not column else "right")

    def shown(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    if result.baseline_perplexity is not None:
        table.add_row("parent", shown(result.baseline_perplexity, 3), "-", "-", "-", "16")
    table.add_row(
        name,
        shown(result.perplexity, 3),
        shown(result.kld_mean, 5),
        shown(result.kld_p99, 5),
        shown(result.top1_agreement, 4),
        shown(result.bits_per_weight, 3),
    )
    Console().print(table)
