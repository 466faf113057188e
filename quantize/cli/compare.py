"""`pq compare`: several models of one parent, side by side, converted first where they are not there."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantize.api.choices import names_of
from quantize.cli import options
from quantize.cli.common import local_model, pick_device, quiet_libraries, say, stop_on_signals
from quantize.cli.progress import progress_bar
from quantize.cli.told import warnings_told
from quantize.errors import UsageError

if TYPE_CHECKING:
    from quantize.api.compared import Comparison


def compare(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[DIR]...", help="Models of one parent: pq's, or what other tools quantized."
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(help="The parent, run once in the same pass: a folder or org/name@REVISION."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="The parent, in place of --baseline, that --recipes convert."
        ),
    ] = None,
    recipes: Annotated[
        str | None,
        typer.Option(
            "--recipes",
            "-r",
            help="Recipes to convert --model with, separated by commas. What --into holds already "
            "is not converted again, what was stopped goes on.",
        ),
    ] = None,
    into: Annotated[
        Path | None,
        typer.Option(help="Folder of these conversions, RECIPE in it; default: compare-MODEL."),
    ] = None,
    revision: options.Revision = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="Text that --recipes are calibrated on; default: the recipe's own."),
    ] = None,
    nsamples: Annotated[int | None, typer.Option(help="Calibration windows.")] = None,
    calibration_seqlen: Annotated[
        int | None, typer.Option(help="Tokens per calibration window.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a stage field of all --recipes. Repeatable."),
    ] = None,
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
    speed: Annotated[
        bool,
        typer.Option("--speed", help="Measure tokens/s here as well, each model in transformers."),
    ] = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Page with table and picture, FILE.html.")
    ] = None,
    form: Annotated[
        str, typer.Option("--format", help="What is printed: table, markdown, csv or latex.")
    ] = "table",
    as_json: options.AsJson = False,
) -> None:
    """Measure models of one parent on the same windows: a table, and accuracy against bytes.

    Give folders and --baseline, or --model and --recipes, which are converted first; or both kinds.
    """
    from quantize.api.comparisons import compare as run
    from quantize.report.exports import EXPORTS

    if form not in ("table", *EXPORTS):
        raise UsageError(f"--format {form}: choose table, {', '.join(EXPORTS)}")
    if as_json and form != "table":
        raise UsageError(f"--json and --format {form}: give one of them")
    quiet_libraries()
    pick_device(device)  # before anything is fetched
    folders = [local_model(each) for each in models or ()]
    parent = None if baseline is None else local_model(baseline)
    source = None if model is None else local_model(model, revision)
    converts = bool(names_of(recipes))
    with (
        stop_on_signals() if converts else nullcontext(lambda: False) as stop,
        progress_bar() as progress,
        warnings_told(),
    ):
        found = run(
            folders,
            parent,
            model=source,
            recipes=recipes,
            into=into,
            revision=None if source is not None else revision,
            calibration=calibration,
            nsamples=nsamples,
            calibration_seqlen=calibration_seqlen,
            set=assignments,
            protocol=protocol,
            dataset=dataset,
            text_field=text_field,
            chat_template=chat_template,
            seqlen=seqlen,
            context=context,
            max_windows=max_windows,
            bos=bos,
            numerics=numerics,
            kv_cache=kv_cache,
            speed=speed,
            device=device,
            dtype=dtype,
            output=output,
            progress=progress,
            say=say,
            stop=stop,
        )
    _tell(found, output, form, as_json)


def _tell(found: Comparison, output: Path | None, form: str, as_json: bool) -> None:
    """Print the figures; the first error of a recipe that could not be carried out ends the command."""
    from quantize.cli.figures import print_comparison

    if output:
        typer.echo(f"{output} written", err=True)
    for note in found.notes:
        say(note)
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=2))
    elif form == "table":
        print_comparison(found.rows, found.parent)
    else:
        typer.echo(found.export(form), nl=False)
    for err in found.errors.values():
        raise err
