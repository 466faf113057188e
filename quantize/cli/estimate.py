"""`pq estimate`: memory, disk and time of a conversion before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from quantize.cli import options
from quantize.cli.common import local_model, pick_device, pick_dtype, quiet_libraries
from quantize.cli.options import size_option


def estimate(
    model: Annotated[str, typer.Option("--model", "-m", help="Model folder, or Hub id org/name.")],
    recipe: Annotated[str, typer.Option("--recipe", "-r", help="Shipped recipe name or path of a YAML file.")],
    dataset: Annotated[str | None, typer.Option(help="Calibration text: builtin, a file, or a Hub set.")] = None,
    nsamples: Annotated[int | None, typer.Option(help="Calibration windows.")] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens per calibration window.")] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a stage field, e.g. bits=3 or activations=none. Repeatable."),
    ] = None,
    max_ram: Annotated[
        str | None, typer.Option(help="As for convert: what it would do to stay below, e.g. 6GB.")
    ] = None,
    max_vram: Annotated[str | None, typer.Option(help="The same for the accelerator's memory.")] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    as_json: options.AsJson = False,
) -> None:
    """What `pq convert` would take: memory at its peak, disk, time. No weights are loaded."""
    from quantize.convert.estimate import estimate as found_for
    from quantize.convert.estimate import within
    from quantize.convert.request import Request
    from quantize.recipe.overrides import with_stage_fields
    from quantize.recipe.recipe import load_recipe

    chosen = load_recipe(recipe).with_overrides(dataset=dataset, nsamples=nsamples, seqlen=seqlen)
    chosen = with_stage_fields(chosen, assignments or [])
    quiet_libraries()
    place = pick_device(device)
    request = Request(
        local_model(model),
        chosen,
        Path("out"),
        place,
        pick_dtype(dtype, place),
        work=Path("out.work"),
        resume="auto",
        max_ram=size_option("--max-ram", max_ram),
        max_vram=size_option("--max-vram", max_vram),
    )
    found = found_for(within(request))
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    from quantize.convert.estimate import shown
    from quantize.cost.units import duration

    table = Table("", "at most", title=f"{chosen.name} on {Path(model).name}, {place.type}", title_justify="left")
    for row in shown(found).items():
        table.add_row(*row)
    table.add_row("time", f"about {duration(found.seconds)}, {duration(found.seconds_per_block)} a block")
    console = Console()
    console.print(table)
    spared = [f"hidden states on the {found.states_on}"] if found.states_on != "device" else []
    spared += ["blocks split by linear"] if found.split else []
    spared += [f"{found.batch_tokens} tokens a pass"] if found.batch_tokens < request.batch_tokens else []
    if spared and (max_ram or max_vram):
        console.print(f"to stay below the limit: {', '.join(spared)}")
