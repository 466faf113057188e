"""What a shell offers behind an option: recipes, model folders, words to choose from."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from quantize.errors import PqError

Offers = list[tuple[str, str]]
"""Words, with help where a shell shows it."""


def recipes(incomplete: str) -> Offers:
    """Aliases and shipped recipes with what they are for, and YAML files of the folder."""
    from quantize.recipe.listing import list_aliases, list_shipped

    try:
        found = [(one.name, one.purpose) for one in (*list_aliases(), *list_shipped())]
    except PqError:  # a broken installation is told of by commands, not by the shell
        found = []
    offers = [(name, text) for name, text in found if name.startswith(incomplete.lower())]
    return offers + [(name, "") for name in _paths(incomplete, _is_yaml)]


def models(incomplete: str) -> Offers:
    """Folders with a config.json, and those that lead there."""
    return [(name, "") for name in _paths(incomplete, _is_model)]


def targets(incomplete: str) -> list[str]:
    """GPUs of the plan's table, and machines without."""
    from quantize.plan.gpus import GPUS

    names = [*(gpu.name for gpu in GPUS), "cpu", "mac"]
    return [name for name in names if name.startswith(incomplete.lower())]


def words(*known: str) -> Callable[[str], list[str]]:
    """Offers a few words."""

    def offer(incomplete: str) -> list[str]:
        return [word for word in known if word.startswith(incomplete)]

    return offer


def _is_yaml(path: Path) -> bool:
    return path.suffix in (".yaml", ".yml")


def _is_model(path: Path) -> bool:
    return (path / "config.json").is_file()


def _paths(incomplete: str, wanted: Callable[[Path], bool]) -> Iterator[str]:
    """Paths that begin so, as they are typed; folders, which may hold some, with a slash."""
    head, _, start = incomplete.rpartition("/")
    folder = Path(head or ("/" if incomplete.startswith("/") else ".")).expanduser()
    before = incomplete[: len(incomplete) - len(start)]
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        name = entry.name
        if not name.startswith(start) or (name.startswith(".") and not start.startswith(".")):
            continue
        path = folder / name
        try:
            if wanted(path):
                yield before + name
            elif path.is_dir():
                yield f"{before}{name}/"
        except OSError:
            continue
