"""`pq bench kernels`, `decode` and `prefill`: speed of packed INT4 weights and
caches beside torch's own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantize.cli import options
from quantize.cli.common import pick_device, titled_table
from quantize.errors import UsageError

if TYPE_CHECKING:
    from quantize.bench.speed.record import Record, Row
    from quantize.bench.speed.stand import Stand

Rounds = Annotated[int, typer.Option(min=1, help="Rounds to take medians over.")]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Results file, written after each figure."),
]
Picture = Annotated[Path | None, typer.Option(help="Roofline to draw, FILE.svg or FILE.png.")]


_WIDTH = 150  # of tables, also where there is no terminal


def kernels(
    shape: Annotated[
        list[str] | None,
        typer.Option(help="Outputs x inputs; default: those of two Llamas."),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Rows of activations; default: 1, 4, 16, 2048.")
    ] = None,
    ffn_rows: Annotated[
        list[int] | None,
        typer.Option(min=1, help="More rows for FFN fronts; default: 16384."),
    ] = None,
    device: options.Device = "cuda",
    rounds: Rounds = 20,
    as_json: options.AsJson = False,
    output: Output = None,
    picture: Picture = None,
) -> None:
    """Products with packed INT4 weights, FFN fronts, rounding to E4M3: times faster than
    torch. Wrong ones end it."""
    sizes = [product_shape(text) for text in shape or ()]
    from quantize.bench.speed import run

    def rows(stand: Stand) -> Iterator[Row]:
        return run.kernels(stand, sizes, batch or run.BATCHES, ffn_rows or (run.FFN_ROWS,))

    _measure("kernels", rows, device, rounds, as_json, output, picture)


def decode(
    context: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Tokens; default: 1024, 8192, 32768."),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Sequences; default: 1, 16."),
    ] = None,
    layers: Annotated[
        int,
        typer.Option(min=0, help="Blocks of the model; 0: attention alone."),
    ] = 32,
    model_context: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Tokens before the model's new one; default: 1024, 8192."),
    ] = None,
    device: options.Device = "cuda",
    rounds: Rounds = 20,
    as_json: options.AsJson = False,
    output: Output = None,
    picture: Picture = None,
) -> None:
    """Decode with an INT4 cache: attention, and steps of a model of
    Llama-3-8B's shape, against bfloat16."""
    from quantize.bench.speed import run

    def rows(stand: Stand) -> Iterator[Row]:
        lengths = context or run.CONTEXTS, batch or run.SEQUENCES
        return run.decode(stand, *lengths, layers, model_context or run.MODEL_CONTEXTS)

    _measure("decode", rows, device, rounds, as_json, output, picture)


def prefill(
    tokens: Annotated[
        list[int] | None,
        typer.Option(min=2, help="Prompt lengths; default: 1024, 4096, 8192."),
    ] = None,
    ffn: Annotated[
        list[str] | None,
        typer.Option(help="Hidden neurons x inputs; default: two Llamas'."),
    ] = None,
    ffn_rows: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Rows of FFNs; default: 16384."),
    ] = None,
    device: options.Device = "cuda",
    rounds: Rounds = 20,
    as_json: options.AsJson = False,
    output: Output = None,
    picture: Picture = None,
) -> None:
    """Prefill: attention with E4M3 queries on INT4 and E4M3 keys and values, and
    whole FFNs, against bfloat16."""
    sizes = [product_shape(text) for text in ffn or ()]
    from quantize.bench.speed import run

    def rows(stand: Stand) -> Iterator[Row]:
        return run.prefill(
            stand,
            tokens or run.PREFILLED,
            sizes or run.FFNS,
            ffn_rows or (run.FFN_ROWS,),
        )

    _measure("prefill", rows, device, rounds, as_json, output, picture)


def product_shape(text: str) -> tuple[int, int]:
    """Outputs and inputs of a packed weight; UsageError unless groups of 128 inputs fit."""
    found = re.fullmatch(r"([1-9]\d{0,8})x([1-9]\d{0,8})", text)
    if not found or int(found[1]) % 128 or int(found[2]) % 128:
        raise UsageError(
            f"--shape {text}: write outputs x inputs in multiples of 128, like 4096x4096",
        )
    return int(found[1]), int(found[2])


def _measure(
    name: str,
    rows: Callable[[Stand], Iterator[Row]],
    device: str,
    rounds: int,
    as_json: bool,
    output: Path | None,
    picture: Path | None,
) -> None:
    if picture and picture.suffix not in (".svg", ".png"):
        raise UsageError(f"--picture {picture}: name a file that ends in .svg or .png")
    where = pick_device(device)
    from quantize.bench.speed.stand import Stand

    stand = Stand(where, rounds)
    record = stand.record()
    found = record.sections.setdefault(name, [])
    for row in rows(stand):
        found.append(row)
        if output:  # a stopped run keeps what it measured
            record.write(output)
    if as_json:
        typer.echo(json.dumps(record.as_json(), indent=2))
    else:
        show(record)
    if picture:
        from quantize.report.roofline import write_roofline

        write_roofline(record.as_json(), picture)


def show(record: Record) -> None:
    """Print the tables of a record, what was left out, and the targets that were missed."""
    from rich.console import Console

    console = Console(markup=False, emoji=False, highlight=False)
    console.width = max(console.width, _WIDTH)
    rates = record.ceilings.matmul.items()
    matmul = ", ".join(f"{name} {rate / 1e12:,.1f} TFLOP/s" for name, rate in rates)
    for name, rows in record.sections.items():
        title = f"{name}; {record.device}: copy {record.ceilings.copy / 1e9:,.0f} GB/s, {matmul}"
        table = titled_table(title)
        peers = list(dict.fromkeys(peer for row in rows for peer in row.peers))
        table.add_column("")
        for column in ("size", "rows", "us", "fastest … slowest", "MB", "of copy", "of matmul"):
            table.add_column(column, justify="right")
        for peer in peers:
            table.add_column(f"x {peer}", justify="right")
        for row in rows:
            table.add_row(*_cells(row), *(_ratio(row, peer) for peer in peers))
        console.print(table)
    for note in record.notes:
        console.print(f"note: {note}")
    for target in record.targets():
        if not target.met:
            console.print(f"missed: {target.name}: {target.found:.2f}, wanted {target.wanted:.2f}")


def _cells(row: Row) -> list[str]:
    spread = f"{row.time.fastest * 1e6:,.1f} … {row.time.slowest * 1e6:,.1f}"
    made = f" ({row.tokens / row.time.seconds:,.0f} tok/s)" if row.tokens else ""
    compute = "" if row.compute is None else f"{row.compute:.0%}"
    figures = (
        f"{row.time.seconds * 1e6:,.1f}{made}",
        spread,
        f"{row.bytes / 1e6:,.1f}",
        f"{row.bandwidth:.0%}",
    )
    return [row.what, row.shape, str(row.M), *figures, compute]


def _ratio(row: Row, peer: str) -> str:
    return f"{row.ratios[peer]:.2f}" if peer in row.peers else ""
