"""`pq report`: one page about a converted model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that pq convert wrote.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Page to write, FILE.html; default: DIR.report.html."),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print the report's data on stdout as well."),
    ] = False,
) -> None:
    """Write DIR.report.html, a page of figures and pictures, from all
    that lies in and beside DIR."""
    from quantize.report import as_json as data_of
    from quantize.report import collect, write_report

    found = collect(folder)
    page = write_report(found, folder, output)
    typer.echo(f"{page} and {page.with_suffix('.json').name} written", err=True)
    if as_json:
        typer.echo(json.dumps(data_of(found), indent=2, allow_nan=False))
