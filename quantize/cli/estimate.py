"""`pq estimate`: memory, disk and time of a conversion before it starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quantize.cli import options
from quantize.cli.common import local_model, pick_device, pick_dtype, quiet_libraries
from quantize.cli.options import size_option
from quantize.cli.told import warnings_told
from quantize.cost.units import gigabytes

if TYPE_CHECKING:
    from rich.console import Console

    from quantize.conversion.trial import Timing


def estimate(
    model: options.Model,
    recipe: options.Recipe,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="As for convert: whether it is free, and has the room on its disk.",
        ),
    ] = None,
    revision: options.Revision = None,
    dataset: options.CalibrationDataset = None,
    nsamples: options.CalibrationWindows = None,
    seqlen: options.CalibrationSeqlen = None,
    seed: options.Seed = None,
    chat_template: options.ChatTemplate = None,
    text_field: options.TextField = None,
    bos: options.CalibrationBos = None,
    assignments: options.Assignments = None,
    target_bpw: options.TargetBpw = None,
    work: options.Work = None,
    resume: options.ResumeOption = "auto",
    overwrite: options.Overwrite = False,
    check_windows: options.CheckWindows = options.CHECK_WINDOWS,
    strict_serving: options.StrictServing = False,
    max_ram: options.MaxRam = None,
    max_vram: options.MaxVram = None,
    device: options.ConversionDevice = "auto",
    dtype: options.Dtype = "auto",
    timed: Annotated[
        bool,
        typer.Option(
            "--time/--no-time",
            help="Whether to measure time, in a trial of some ten seconds on one block; else no weight is loaded.",
        ),
    ] = True,
    as_json: options.AsJson = False,
) -> None:
    """What `pq convert` would take: memory at its peak, disk, time. Nothing is written."""
    from quantize.api.conversions import chosen_recipe
    from quantize.conversion.estimate import estimate as found_for
    from quantize.conversion.estimate import within
    from quantize.conversion.request import Request
    from quantize.cost.peak import keep_little
    from quantize.files.disk import free_bytes
    from quantize.files.hub_origin import called
    from quantize.files.transaction import require_apart, require_free

    if output is not None:
        require_free(output, overwrite)
    place_of_output = output or Path("out")
    kept = work or place_of_output.with_name(place_of_output.name + ".work")
    keep_little()  # as `pq convert` does, whose memory this is about
    chosen = chosen_recipe(
        recipe,
        assignments,
        dataset=dataset,
        nsamples=nsamples,
        seqlen=seqlen,
        seed=seed,
        chat_template=chat_template,
        text_field=text_field,
        bos=bos,
    )
    quiet_libraries()
    place = pick_device(device)
    source = local_model(model, revision)
    if output is not None:
        require_apart(source, output, kept)
    request = Request(
        source,
        chosen,
        place_of_output,
        place,
        pick_dtype(dtype, place),
        work=kept,
        resume=options.resume_mode(resume),
        overwrite=overwrite,
        target_bpw=target_bpw,
        strict_serving=strict_serving,
        check_windows=check_windows,
        max_ram=size_option("--max-ram", max_ram),
        max_vram=size_option("--max-vram", max_vram),
    )
    with warnings_told():
        found = found_for(within(request), timed)
    free = None if output is None else free_bytes(output)
    if as_json:
        room = {} if free is None else {"disk_free": free}
        typer.echo(json.dumps(found.as_json() | room, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    from quantize.conversion.estimate import rows_of

    table = Table(
        "",
        "at most",
        title=f"{chosen.name} on {called(request.model)}, {place.type}",
        title_justify="left",
    )
    for row in rows_of(found).items():
        table.add_row(*row)
    console = Console()
    console.print(table)
    if free is not None and free < found.disk:
        console.print(f"the disk of {output} has {gigabytes(free)} free, which is too little")
    if found.time is not None:
        _print_time(console, found.time)
    spared = [f"hidden states on the {found.states_on}"] if found.states_on != "device" else []
    spared += ["blocks split by linear"] if found.split else []
    spared += (
        [f"{found.batch_tokens} tokens a pass"] if found.batch_tokens < request.batch_tokens else []
    )
    if spared and (max_ram or max_vram):
        console.print(f"to stay below the limit: {', '.join(spared)}")


def _print_time(console: Console, time: Timing) -> None:
    """Time in all, its range, where it goes, and what stands behind the figures."""
    from quantize.cost.units import duration

    between = f"{duration(time.seconds_low)} to {duration(time.seconds_high)}"
    console.print(
        f"time: about {duration(time.seconds)} ({between}), {duration(time.seconds_per_block)} a "
        "block"
    )
    longest = sorted(time.seconds_by_part.items(), key=lambda part: -part[1])
    shown = [
        f"{part} {duration(seconds)}"
        for part, seconds in longest[:4]
        if seconds >= time.seconds / 20
    ]
    console.print(f"most of it: {', '.join(shown)}")
    reduced = f", on {' and '.join(time.reduced)}" if time.reduced else ""
    console.print(
        f"measured on this machine now, in a trial of {duration(time.trial_seconds)}{reduced}"
    )
    if time.not_counted:
        console.print(f"not counted: {'; '.join(time.not_counted)}")
