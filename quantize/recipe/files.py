"""Recipe files: where they lie, their names and their bytes.

Nothing here builds a stage, so that finding and printing recipes loads no torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.errors import RecipeError
from quantize.files import strict_yaml
from quantize.files.problems import show_value
from quantize.files.resources import data_dir
from quantize.recipe.aliases import ALIASES, alias_of


@dataclass(frozen=True)
class Found:
    """A recipe file that a name stands for."""

    path: Path
    settings: tuple[str, ...] = ()
    """Of its stages, as `--set` takes them: those of an alias."""


def shipped_recipes() -> list[Path]:
    """Return the recipe files that come with pq, sorted by name."""
    try:
        return sorted(data_dir("recipes").glob("*.yaml"))
    except FileNotFoundError as err:
        raise RecipeError(str(err)) from None


def find_recipe(name_or_path: str) -> Path:
    """Return the file of a recipe; arguments and errors as of `find`."""
    return find(name_or_path).path


def find(name_or_path: str) -> Found:
    """Return what a name stands for: an existing path wins, else a shipped name, `.yaml` or not, or an
    alias (`quantize.recipe.aliases`), both in whatever case.

    Raises RecipeError with the names when there is neither.
    """
    path = Path(name_or_path)
    what = "no such file"
    with suppress(OSError, ValueError):  # name too long, NUL
        if path.is_dir():
            what = "is a folder"
        elif path.exists():  # not is_file(): a pipe is a recipe too
            return Found(path)
    shipped = {file.stem: file for file in shipped_recipes()}
    name = name_or_path.removesuffix(".yaml")
    if file := shipped.get(name, shipped.get(name.lower())):
        return Found(file)
    aliases = {alias.name: alias for alias in ALIASES if alias.recipe in shipped}
    if (alias := alias_of(name)) and alias.name in aliases:
        return Found(shipped[alias.recipe], alias.settings)
    near = nearest(path.name.removesuffix(".yaml"), [*shipped, *aliases])
    near = near or "give a path or a shipped name "
    names = ", ".join(shipped) or "none"
    names += f"; by scheme: {', '.join(aliases)}" if aliases else ""
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


def nearest(word: Any, options: Iterable[str]) -> str:
    """Return "did you mean 'option'? " for the option nearest to `word`, else nothing."""
    plain = str(word).lower().replace("-", "_")
    matches = difflib.get_close_matches(plain, list(options), n=1)
    return f"did you mean '{matches[0]}'? " if matches else ""
