"""Recipe files: where they lie, their bytes, and what they say of themselves.

Nothing here builds a stage, so that listing and printing recipes loads no torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.errors import RecipeError
from quantize.files import strict_yaml
from quantize.files.problems import error_of, show_value
from quantize.files.resources import data_dir


@dataclass(frozen=True)
class Listing:
    """What one recipe file says of itself, defaults not filled in."""

    name: str
    methods: list[str]
    bits: list[int]
    """Bits that its stages state, in their order, each value once."""
    activations: list[str]
    """Numerics of the activations that its stages state, likewise."""
    description: str


def shipped_recipes() -> list[Path]:
    """Return the recipe files that come with pq, sorted by name."""
    try:
        return sorted(data_dir("recipes").glob("*.yaml"))
    except FileNotFoundError as err:
        raise RecipeError(str(err)) from None


def find_recipe(name_or_path: str) -> Path:
    """Return the file of a recipe: an existing path wins, else a shipped name, `.yaml` or not.

    Raises RecipeError with the shipped names when there is neither.
    """
    path = Path(name_or_path)
    what = "no such file"
    with suppress(OSError, ValueError):  # name too long, NUL
        if path.is_dir():
            what = "is a folder"
        elif path.exists():  # not is_file(): a pipe is a recipe too
            return path
    shipped = {file.stem: file for file in shipped_recipes()}
    if file := shipped.get(name_or_path.removesuffix(".yaml")):
        return file
    near = nearest(path.name.removesuffix(".yaml"), shipped) or "give a path or a shipped name "
    names = ", ".join(shipped) or "none"
    text = f"{what} and no shipped recipe of that name; {near}(shipped: {names})"
    raise RecipeError(f"recipe {show_value(name_or_path)}: {text}")


def read_recipe(path: Path, source: str) -> bytes:
    """Return the bytes of a recipe file, one more than is allowed at most.

    source: its name for messages. Raises RecipeError when it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(strict_yaml.MAX_BYTES + 1)
    except OSError as err:
        reason = f"cannot be read: {err.strerror}; check the file's permissions"
        raise RecipeError(f"{source}: {reason}") from None


def list_shipped() -> list[Listing]:
    """Return what each shipped recipe says of itself; RecipeError for one that is no recipe."""
    return [_listing(path) for path in shipped_recipes()]


def nearest(word: Any, options: Iterable[str]) -> str:
    """Return "did you mean 'option'? " for the option nearest to `word`, else nothing."""
    plain = str(word).lower().replace("-", "_")
    matches = difflib.get_close_matches(plain, list(options), n=1)
    return f"did you mean '{matches[0]}'? " if matches else ""


def _listing(path: Path) -> Listing:
    document = strict_yaml.load(read_recipe(path, str(path)), str(path))
    if document.problems:
        raise error_of(document.source, document.problems)
    try:
        stages = document.data["stages"]
        return Listing(
            name=path.stem,
            methods=[str(stage["method"]) for stage in stages],
            # Blocks have their bits in the name of their type: q4_0.
            bits=_distinct(stages, "bits") or [int(t[1]) for t in _distinct(stages, "type")],
            activations=_distinct(stages, "activations"),
            description=str(document.data["description"]),
        )
    except (KeyError, TypeError):
        remedy = f"`pq recipe validate {path.stem}` says why"
        raise RecipeError(f"{path}: is no recipe; {remedy}") from None


def _distinct(stages: list[Mapping[str, Any]], field: str) -> list[Any]:
    """Return the values that stages give to `field`, in their order, each once."""
    return list(dict.fromkeys(stage[field] for stage in stages if field in stage))
