"""`pq recipe`: list, print and check recipes. quantize.recipe.recipe needs torch, so only the commands import it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantize.errors import RecipeError

if TYPE_CHECKING:
    from quantize.recipe.recipe import Recipe

app = typer.Typer(help="List, print and check recipes.", no_args_is_help=True)


@app.command("ls")
def list_recipes(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the recipes that come with pq."""
    from quantize.recipe.recipe import load_recipe, shipped_recipes

    rows = [_row(load_recipe(str(path))) for path in shipped_recipes()]
    if as_json:
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
    else:
        _print_table(rows)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="Shipped name or path.")],
    resolved: Annotated[bool, typer.Option("--resolved", help="Check it and fill in every default.")] = False,
) -> None:
    """Print a recipe as YAML."""
    from quantize.recipe.recipe import find_recipe, load_recipe, resolved_yaml

    if resolved:
        typer.echo(resolved_yaml(load_recipe(name)), nl=False)
        return
    path = find_recipe(name)
    try:
        typer.echo(path.read_bytes(), nl=False)
    except OSError as err:
        raise RecipeError(f"{path}: cannot be read: {err.strerror}; check the file's permissions") from None


@app.command()
def validate(files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Paths or shipped names.")]) -> None:
    """Check recipes: `ok` for each good one on stdout, every problem of the others on stderr."""
    from quantize.recipe.recipe import load_recipe

    broken = False
    for file in files:
        try:
            load_recipe(file)
        except RecipeError as err:
            broken = True
            typer.echo(str(err), err=True)
        else:
            typer.echo(f"{file}: ok")
    if broken:
        raise typer.Exit(RecipeError.exit_code)


@app.command()
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    from quantize.recipe.recipe import recipe_schema

    typer.echo(json.dumps(recipe_schema(), indent=2, ensure_ascii=False))


def _row(recipe: Recipe) -> dict[str, Any]:
    encodes = [stage for stage in recipe.stages if stage.kind == "encode"]
    return {
        "name": recipe.name,
        "methods": [stage.method for stage in recipe.stages],
        "bits": _distinct(encodes, "bits"),
        "activations": _distinct(encodes, "activations"),
        "description": recipe.description,
    }


def _distinct(stages: list[Any], field: str) -> list[Any]:
    """Return the values of `field` in stage order, each once; a layout without that field adds none."""
    return list(dict.fromkeys(getattr(stage, field) for stage in stages if hasattr(stage, field)))


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "methods", "bits", "activations", "description", box=None, pad_edge=False)
    for column in table.columns[:2]:
        column.no_wrap = True
    for row in rows:
        lists = [", ".join(map(str, row[key])) or "-" for key in ("bits", "activations")]
        table.add_row(row["name"], " → ".join(row["methods"]), *lists, row["description"])
    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = 200  # a pipe has no width; whole lines can be searched
    console.print(table)
