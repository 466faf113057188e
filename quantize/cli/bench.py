"""`pq bench`: speed and error of one step alone, mostly on random data."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from quantize.cli import bench_speed, options
from quantize.cli.common import local_model, pick_device, pick_dtype, titled_table
from quantize.errors import UsageError

if TYPE_CHECKING:
    from quantize.bench.ffn import FfnBench, FfnTiming
    from quantize.bench.fit import FitBench
    from quantize.bench.multiply import MultiplyBench
    from quantize.methods.sbvr.fit import CodebookKind

app = typer.Typer(help="Measure one step alone, on random data.", no_args_is_help=True)
app.command()(bench_speed.kernels)
app.command()(bench_speed.decode)
app.command()(bench_speed.prefill)


@app.command()
def fit(
    method: Annotated[
        str,
        typer.Option(help="sbvr, rtn (largest weight ends the grid) or rtn-mse (best scale)."),
    ],
    bits: Annotated[int, typer.Option(help="Bits of a code, 2 to 8.")] = 4,
    shape: Annotated[str, typer.Option(help="Outputs x inputs, like 4096x4096.")] = "4096x4096",
    group_size: Annotated[int, typer.Option(help="Inputs that share a line or a scale.")] = 128,
    bias: Annotated[bool, typer.Option("--bias", help="sbvr: lines with a constant.")] = False,
    lines: Annotated[int, typer.Option(help="sbvr: most lines in the codebook.")] = 256,
    codebook: Annotated[
        str,
        typer.Option(help="sbvr: lines, shapes (times scales) or auto."),
    ] = "auto",
    distribution: Annotated[str, typer.Option(help="gaussian, laplace or student.")] = "gaussian",
    seed: Annotated[int, typer.Option(min=0, help="Of the weights and of the fit.")] = 0,
    device: options.Device = "cpu",
    repeat: Annotated[int, typer.Option(min=1, help="Fits to take the median time of.")] = 3,
    as_json: options.AsJson = False,
) -> None:
    """Fit a random weight: relative squared error, weights per second, memory."""
    size = _sizes(shape)
    from quantize.bench.fit import FitSettings, bench_fit

    kind = cast("CodebookKind", codebook)  # checked by the settings
    settings = FitSettings(method, bits, size, group_size, bias, lines, kind, distribution, seed)
    measured = bench_fit(settings, pick_device(device), repeat)
    if as_json:
        typer.echo(json.dumps(_facts(measured), indent=2))
    else:
        _print(measured)


@app.command()
def multiply(
    bits: Annotated[int, typer.Option(help="Bit planes, 2 to 8.")] = 4,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="Outputs x inputs; default: those of Llama-3-8B."),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Rows of activations; default: 1, 4, 16."),
    ] = None,
    group_size: Annotated[int, typer.Option(help="Inputs that share a line.")] = 128,
    bias: Annotated[bool, typer.Option("--bias", help="Lines with a constant.")] = False,
    lines: Annotated[int, typer.Option(help="Lines in the codebook.")] = 256,
    blocks: Annotated[
        int,
        typer.Option(min=0, help="Also time all linears of so many Llama-3-8B blocks."),
    ] = 0,
    device: options.Device = "cpu",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds to take medians over.")] = 20,
    as_json: options.AsJson = False,
) -> None:
    """Multiply with bit vectors: time, share of the memory's speed, times faster than
    torch. Wrong products end it."""
    sizes = [_sizes(text) for text in shape or ()]
    from quantize.bench.multiply import LLAMA_3_8B, bench
    from quantize.formats.bitvec import BitVecScheme

    try:
        scheme = BitVecScheme(bits, group_size, bias, lines, 1)
    except ValueError as err:
        raise UsageError(str(err)) from None
    measured = bench(
        sizes or LLAMA_3_8B,
        batch or (1, 4, 16),
        scheme,
        pick_device(device),
        rounds,
        blocks,
    )
    if as_json:
        typer.echo(json.dumps(measured.as_json(), indent=2))
    else:
        _print_products(measured)


@app.command()
def ffn(
    hidden: Annotated[int, typer.Option(min=1, help="Inputs and outputs of the FFN.")] = 4096,
    intermediate: Annotated[
        int,
        typer.Option(min=1, help="Hidden neurons of the dense FFN."),
    ] = 11008,
    form: Annotated[
        list[str] | None,
        typer.Option(
            help="Shared neurons + experts x neurons @ mean experts of a token; default: "
            "2816+8x1024@4. May be given several times.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Its first Mixture of Experts instead of random weights."),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Rows of activations; default: 1, 32."),
    ] = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = "auto",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds to take medians over.")] = 20,
    as_json: options.AsJson = False,
) -> None:
    """Time Mixtures of Experts against the dense FFN they stand for, and
    against a loop over experts."""
    if model and form:
        raise UsageError("--model and --form: a model has its own form, give one of them")
    where, batches = pick_device(device), batch or (1, 32)
    parts = [_form(text) for text in form or ("2816+8x1024@4",)]
    kind = pick_dtype(dtype, where)
    from quantize.bench.ffn import Form, bench_forms, bench_model

    if model:
        measured = bench_model(local_model(model), batches, where, kind, rounds)
    else:
        forms = [Form(*part) for part in parts]
        measured = bench_forms(hidden, intermediate, forms, batches, where, kind, rounds)
    if as_json:
        typer.echo(json.dumps(measured.as_json(), indent=2))
    else:
        _print_ffns(measured)


def _form(text: str) -> tuple[int, int, int, float]:
    found = re.fullmatch(r"([1-9]\d{0,8})\+([1-9]\d{0,3})x([1-9]\d{0,8})@(\d{1,4}(?:\.\d+)?)", text)
    if not found:
        raise UsageError(
            f"--form {text}: write shared + experts x size @ experts a token, like 2816+8x1024@4",
        )
    shared = int(found[1])
    n = int(found[2])
    size = int(found[3])
    k = float(found[4])
    if not 0 < k <= n:
        raise UsageError(f"--form {text}: a token can visit more than 0 and up to {n} experts")
    return shared, n, size, k


def _sizes(shape: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d{0,8})x([1-9]\d{0,8})", shape)
    if not found:
        raise UsageError(f"--shape {shape}: write outputs x inputs, like 4096x4096")
    return int(found[1]), int(found[2])


def _facts(measured: FitBench) -> dict[str, Any]:
    """All in one level; what a method does not have is null."""
    facts = dataclasses.asdict(measured)
    settings: dict[str, Any] = facts.pop("settings")
    if measured.settings.method != "sbvr":
        settings |= dict.fromkeys(("bias", "lines", "codebook"))
    return settings | facts


def _print(measured: FitBench) -> None:
    from rich.console import Console

    s = measured.settings
    cache = f", {measured.shapes} × {measured.scales} lines" if measured.shapes else ""
    bias = " + bias" if s.bias else ""
    title = f"{s.method} {s.bits} bits{bias}{cache}, groups of {s.group_size}"
    table = titled_table(title)
    table.add_column(f"{s.shape[0]}x{s.shape[1]} {s.distribution}")
    table.add_column(f"{measured.device}, {measured.threads} threads", justify="right")
    table.add_row("relative MSE", f"{measured.relative_mse:.4g}")
    table.add_row("bits per weight", f"{measured.bits_per_weight:.4f}")
    table.add_row("seconds", f"{measured.seconds:.2f}")
    table.add_row("weights per second", f"{measured.weights_per_second:,.0f}")
    table.add_row("peak memory, MB", f"{measured.peak_rss_bytes / 1e6:,.0f}")
    if measured.peak_device_bytes is not None:
        table.add_row("peak on the device, MB", f"{measured.peak_device_bytes / 1e6:,.0f}")
    Console(markup=False, emoji=False, highlight=False).print(table)


def _print_products(measured: MultiplyBench) -> None:
    from rich.console import Console

    scheme = measured.scheme
    title = f"{scheme.bits} bit planes, groups of {scheme.group_size}; {measured.device}"
    table = titled_table(title)
    for column in (
        "N x K",
        "rows",
        "us",
        "fastest … slowest",
        "of the copy rate",
        f"x {measured.baseline}",
    ):
        table.add_column(column, justify="right")
    for t in measured.shapes:
        spread = f"{t.fastest * 1e6:,.0f} … {t.slowest * 1e6:,.0f}"
        cells = (f"{t.seconds * 1e6:,.1f}", spread, f"{t.bandwidth:.0%}", f"{t.speedup:.2f}")
        table.add_row(f"{t.N} x {t.K}", str(t.M), *cells)
    for token in measured.tokens:
        name = f"{token.linears} linears"
        table.add_row(
            name,
            str(token.M),
            f"{token.seconds * 1e6:,.1f}",
            "",
            "",
            f"{token.speedup:.2f}",
        )
    Console(markup=False, emoji=False, highlight=False).print(table)


def _print_ffns(measured: FfnBench) -> None:
    from rich.console import Console

    size = f"{measured.hidden} x {measured.intermediate} {measured.dtype}"
    title = f"FFN {size}; {measured.device}, {measured.threads} threads"
    table = titled_table(title)
    table.add_column("us")
    for t in measured.timings:
        table.add_column(f"{t.form}\n{t.M} rows", justify="right")
    for row in zip(*(_ffn_cells(t) for t in measured.timings), strict=True):
        table.add_row(row[0][0], *(cell for _, cell in row))
    Console(markup=False, emoji=False, highlight=False).print(table)


def _ffn_cells(t: FfnTiming) -> list[tuple[str, str]]:
    return [
        ("all experts at once", _us(t.seconds)),
        ("  fastest … slowest", f"{_us(t.fastest)} … {_us(t.slowest)}"),
        ("loop over experts", _us(t.loop_seconds)),
        ("dense", _us(t.plain_seconds)),
        ("  fastest … slowest", f"{_us(t.plain_fastest)} … {_us(t.plain_slowest)}"),
        ("times faster than dense", f"{t.speedup:.2f}"),
        ("MB read", f"{t.bytes_read / 1e6:,.1f}"),
        ("  of the dense FFN's", f"{t.bytes_read / t.plain_bytes_read:.0%}"),
        ("experts a token", f"{t.experts_per_token:.2f}"),
        ("activated parameters", f"{t.activated:.0%}"),
    ]


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f}"
