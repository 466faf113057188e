"""Which folders a gate file means, and which of its entries a folder is."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from quantize.errors import UsageError
from quantize.files.problems import Place, error_of
from quantize.files.provenance import read_provenance
from quantize.gate.entries import Entry, GateFile

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")
Locate = Callable[[str], Path | None]
"""Hub id → folder of the Hub's cache; None where the Hub is not asked."""


def no_hub(name: str) -> Path | None:
    """Asks no Hub."""
    return None


def parent_of(gate: GateFile, locate: Locate) -> Path:
    """Folder of the file's model. UsageError where it names none, RecipeError where there is no
    such folder."""
    if gate.model is None:
        raise UsageError(
            f"{gate.path} names no model; add 'model: FOLDER', or give a model and --baseline",
        )
    return _find(gate, ("model",), str(gate.document.data["model"]), locate)


def place_of(gate: GateFile, entry: Entry, locate: Locate) -> Path | None:
    """Folder of a checkpoint's entry; None for a recipe, which has yet to be converted.
    RecipeError where there is no such folder."""
    if entry.checkpoint is None:
        return None
    said = "folder" in gate.document.data["checkpoints"][entry.name]
    place = (*entry.place, "folder") if said else entry.place
    return _find(gate, place, entry.checkpoint, locate)


def _find(gate: GateFile, place: Place, name: str, locate: Locate) -> Path:
    there = gate.path.parent / Path(name).expanduser()
    if there.is_dir():
        return there
    if HUB_ID.fullmatch(name) and (found := locate(name)) is not None:
        return found
    text = f"no such folder: {there}; the path starts from this file's"
    raise error_of(gate.document.source, [gate.document.problem(place, text)])


def entries_of(gate: GateFile, model: Path) -> list[Entry]:
    """The entries that a folder could be: the checkpoint's of the same folder or, failing that,
    name; else those of its recipe. UsageError where there is none."""
    checkpoints = [entry for entry in gate.entries if entry.checkpoint is not None]
    same = [entry for entry in checkpoints if _is_same(gate.path.parent, entry, model)]
    name = os.path.basename(os.path.abspath(model))
    if found := same or [
        entry
        for entry in checkpoints
        if name in (entry.name, os.path.basename(str(entry.checkpoint).rstrip("/")))
    ]:
        return found
    names = ", ".join(entry.name for entry in gate.entries)
    provenance = read_provenance(model)
    if provenance is None:
        raise UsageError(
            f"{model} has no pq.json that names its recipe, and no checkpoint of {gate.path} has "
            f"its name; name its entry with --only (entries: {names})",
        )
    recipe = provenance["recipe"]["name"]
    recipes = [entry for entry in gate.entries if entry.recipe is not None]
    found = [entry for entry in recipes if entry.name == recipe]
    found = found or [e for e in recipes if e.recipe is not None and e.recipe.name == recipe]
    if not found:
        problem = f"{gate.path} has no entry for {model}'s recipe '{recipe}'"
        raise UsageError(f"{problem}; name one (entries: {names})")
    return found


def _is_same(folder: Path, entry: Entry, model: Path) -> bool:
    there = folder / Path(str(entry.checkpoint)).expanduser()
    return there.is_dir() and model.is_dir() and there.samefile(model)
