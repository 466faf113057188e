"""`pq recipe`: list, print and check recipes.

quantize.recipe.recipe needs torch, so only the commands that build stages import it.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from quantize.errors import RecipeError

if TYPE_CHECKING:
    from quantize.recipe.files import Listing

app = typer.Typer(help="List, print and check recipes.", no_args_is_help=True)


@app.command("ls")
def list_recipes(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the recipes that come with pq."""
    from quantize.recipe.files import list_shipped

    listings = list_shipped()
    if as_json:
        rows = [asdict(listing) for listing in listings]
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
    else:
        _print_table(listings)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="Shipped name or path.")],
    resolved: Annotated[
        bool,
        typer.Option("--resolved", help="Check it and fill in every default."),
    ] = False,
) -> None:
    """Print a recipe as YAML."""
    if resolved:
        from quantize.recipe.recipe import load_recipe, resolved_yaml

        typer.echo(resolved_yaml(load_recipe(name)), nl=False)
        return
    from quantize.recipe.files import find_recipe

    path = find_recipe(name)
    try:
        typer.echo(path.read_bytes(), nl=False)
    except OSError as err:
        reason = f"cannot be read: {err.strerror}; check the file's permissions"
        raise RecipeError(f"{path}: {reason}") from None


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


def _print_table(listings: list[Listing]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = ("name", "methods", "bits", "activations", "description")
    table = Table(*columns, box=None, pad_edge=False)
    for column in table.columns[:2]:
        column.no_wrap = True
    for listing in listings:
        methods = " → ".join(listing.methods)
        bits = ", ".join(map(str, listing.bits)) or "-"
        activations = ", ".join(map(str, listing.activations)) or "-"
        table.add_row(listing.name, methods, bits, activations, listing.description)
    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = 200  # a pipe has no width; whole lines can be searched
    console.print(table)
