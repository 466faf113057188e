"""`pq verify`: is a checkpoint still what was written, and does it stand for its parent?"""

from __future__ import annotations

import dataclasses
import json
import os
from typing import TYPE_CHECKING, Annotated

import typer

from quantize.cli.common import local_model, pick_device, quiet_libraries
from quantize.cli.inspect import printable
from quantize.cli.progress import progress_bar
from quantize.errors import VerifyError

if TYPE_CHECKING:
    from quantize.verification import Check


def verify(
    model: Annotated[str, typer.Argument(metavar="DIR", help="Folder that pq convert wrote.")],
    parent: Annotated[
        str | None,
        typer.Option(
            help="The model it was made from, a folder or org/name@REVISION: compare with it and run blocks of both."
        ),
    ] = None,
    blocks: Annotated[int, typer.Option(min=1, help="Blocks to compare with the parent's.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of blocks.")] = 0,
    kernels: Annotated[
        bool,
        typer.Option(
            "--kernels",
            help="Run the Triton kernels on its tensors beside their twins: on all of them on "
            "cuda, on a sample in Triton's interpreter on a CPU.",
        ),
    ] = False,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda, cuda:1, mps; used with --parent and --kernels.")
    ] = "cpu",
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print the checks as JSON on stdout."),
    ] = False,
) -> None:
    """Check files, layout and numbers of a checkpoint; exit code 7 when anything is wrong."""
    place = pick_device(device)
    if kernels and place.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    from quantize.verification import verify as run

    quiet_libraries()
    folder, source = local_model(model), None if parent is None else local_model(parent)
    with progress_bar() as progress:
        result = run(
            folder,
            source,
            blocks=blocks,
            seed=seed,
            device=place,
            kernels=kernels,
            progress=progress,
        )
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(result), indent=2, ensure_ascii=False))
    else:
        for check in result.checks:
            typer.echo(printable(_line(check)))
    if result.first_failure:
        raise VerifyError(printable(result.first_failure))


def _line(check: Check) -> str:
    verdict = {True: "ok", False: "FAILED", None: "skipped"}[check.ok]
    return f"{verdict:<8} {check.name:<11} {check.detail or check.skipped_reason}"
