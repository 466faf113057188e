"""`pq compare`: several conversions of one parent, side by side."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

import quantize
from quantize.cli import options
from quantize.cli.common import local_model, pick_device, pick_dtype, quiet_libraries
from quantize.cli.progress import progress_bar
from quantize.cli.told import warnings_told


def compare(
    models: Annotated[
        list[str],
        typer.Argument(metavar="DIR...", help="Conversions of one parent."),
    ],
    baseline: Annotated[
        str,
        typer.Option(help="The parent, run once in the same pass: a folder or org/name@REVISION."),
    ],
    protocol: options.ProtocolOption = None,
    dataset: options.Dataset = None,
    text_field: options.TextField = None,
    chat_template: options.ChatTemplate = None,
    seqlen: options.Seqlen = 512,
    context: options.Context = 0,
    max_windows: options.MaxWindows = None,
    bos: options.BosOption = "auto",
    numerics: options.NumericsOption = "kernel",
    kv_cache: options.KvCache = "auto",
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Page with table and picture, FILE.html.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure conversions of one parent on the same windows: a table, and accuracy against bits."""
    options.check_choices(protocol, numerics)
    from quantize.cli.figures import print_comparison
    from quantize.evaluation.protocols import Protocol
    from quantize.evaluation.run import measure
    from quantize.formats.registry import open_checkpoint
    from quantize.report import write_page
    from quantize.report.comparison import comparison

    quiet_libraries()
    folders = [local_model(model) for model in models]
    place = pick_device(device)
    with progress_bar() as progress, warnings_told():
        measured = measure(
            folders,
            local_model(baseline),
            Protocol("rolling" if protocol == "rolling" else "strided", seqlen, context),
            dataset=dataset or "builtin",
            text_field=text_field,
            chat_template=chat_template,
            max_windows=max_windows,
            bos=options.bos_choice(bos),
            device=place,
            dtype=pick_dtype(dtype, place),
            attention=options.kv_numerics(kv_cache),
            numerics="stock" if numerics == "stock" else "kernel",
            progress=progress,
        )
    evaluations = [m.figures for m in measured]
    sizes = [
        sum((f / shard).stat().st_size for shard in open_checkpoint(f).shards) for f in folders
    ]
    if output:
        write_page(comparison(evaluations, sizes, quantize.__version__), output)
        typer.echo(f"{output} written", err=True)
    if as_json:
        pairs = zip(evaluations, sizes, strict=True)
        facts = [dataclasses.asdict(evaluation) | {"bytes": size} for evaluation, size in pairs]
        typer.echo(json.dumps(facts, indent=2))
    else:
        print_comparison(evaluations, sizes)
