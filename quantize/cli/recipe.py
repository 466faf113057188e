"""`pq recipe`: list, print, compare and check recipes.

quantize.recipe.recipe needs torch, so only the commands that build stages import it.
"""

from __future__ import annotations

import difflib
import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from quantize.cli.inspect import printable
from quantize.errors import RecipeError

if TYPE_CHECKING:
    from quantize.recipe.listing import Listing

app = typer.Typer(help="List, print, compare and check recipes.", no_args_is_help=True)


@app.command("ls")
def list_recipes(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the recipes that come with pq, in a line each; `list` does the same."""
    from quantize.recipe.listing import list_aliases, list_shipped

    aliases, shipped = list_aliases(), list_shipped()
    if as_json:
        rows = [asdict(listing) for listing in (*aliases, *shipped)]
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
    else:
        for line in table_lines(aliases, shipped):
            typer.echo(printable(line))


app.command("list", hidden=True)(list_recipes)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="Shipped name, alias or path.")],
    resolved: Annotated[
        bool,
        typer.Option("--resolved", help="Check it and fill in every default."),
    ] = False,
) -> None:
    """Print a recipe as YAML."""
    from quantize.recipe.files import find

    found = find(name)
    if resolved or found.settings:
        from quantize.recipe.recipe import load_recipe, resolved_yaml

        if found.settings:
            typer.echo(f"# {found.path.name} with {', '.join(found.settings)}")
        typer.echo(resolved_yaml(load_recipe(name)), nl=False)
        return
    try:
        typer.echo(found.path.read_bytes(), nl=False)
    except OSError as err:
        reason = f"cannot be read: {err.strerror}; check the file's permissions"
        raise RecipeError(f"{found.path}: {reason}") from None


@app.command()
def diff(
    one: Annotated[str, typer.Argument(metavar="RECIPE", help="Shipped name, alias or path.")],
    other: Annotated[str, typer.Argument(metavar="OTHER", help="Another.")],
) -> None:
    """Show in which fields two recipes differ, defaults filled in. Exit code 1 where they do."""
    from quantize.recipe.recipe import load_recipe, resolved_yaml

    before, after = (resolved_yaml(load_recipe(name)).splitlines() for name in (one, other))
    lines = list(difflib.unified_diff(before, after, one, other, lineterm=""))
    for line in lines:
        typer.echo(printable(line))
    if lines:
        raise typer.Exit(1)


@app.command()
def validate(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Paths or shipped names.")],
) -> None:
    """Check recipes: `ok` for each good one on stdout, every problem of the others on stderr.

    What vLLM would not serve of any model under a good one stands on stderr as well.
    """
    from quantize.recipe.recipe import load_recipe
    from quantize.recipe.serving import unserved_by

    broken = False
    for file in files:
        try:
            recipe = load_recipe(file)
        except RecipeError as err:
            broken = True
            typer.echo(str(err), err=True)
        else:
            typer.echo(f"{file}: ok")
            for line in unserved_by(recipe):
                typer.echo(f"{file}: {line}", err=True)
    if broken:
        raise typer.Exit(RecipeError.exit_code)


@app.command()
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    from quantize.recipe.recipe import recipe_schema

    typer.echo(json.dumps(recipe_schema(), indent=2, ensure_ascii=False))


def table_lines(aliases: Sequence[Listing], shipped: Sequence[Listing]) -> Iterator[str]:
    """Lines of at most 80 columns: aliases, recipes, what columns mean."""
    from quantize.recipe.listing import HEADS, LEGEND, WIDTH

    rows = [listing.cells() for listing in (*aliases, *shipped)]
    widths = [max(len(cells[i]) for cells in (HEADS, *rows)) for i in range(len(HEADS) - 1)]
    yield _line(HEADS, widths)
    for index, cells in enumerate(rows):
        if index == len(aliases) > 0:
            yield ""
        yield _line(cells, widths)
    yield ""
    for alias in aliases:
        settings = "".join(f" --set {setting}" for setting in alias.settings)
        yield f"{alias.name} is {alias.recipe}{settings}"
    for text in LEGEND:
        yield from textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """One recipe; numbers stand right, and the last cell is cut where there is no room for it."""
    from quantize.recipe.listing import WIDTH

    parts = [
        cell.rjust(width) if index in (3, 4) else cell.ljust(width)
        for index, (cell, width) in enumerate(zip(cells[:-1], widths, strict=True))
    ]
    head = "  ".join(parts) + "  "
    last, room = cells[-1], WIDTH - len(head)
    return (head + (last if len(last) <= room else f"{last[: max(0, room - 1)]}…")).rstrip()
