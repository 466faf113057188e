"""`pq gate init`: measures recipes and checkpoints, and makes the first gate file of what it finds."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from quantize.conversion.loop import Request, convert
from quantize.errors import UsageError
from quantize.evaluation.parents import ParentCache
from quantize.evaluation.protocols import Protocol
from quantize.evaluation.run import measure
from quantize.files.problems import show_value
from quantize.gate.entries import Settings
from quantize.gate.fields import close
from quantize.gate.places import HUB_ID, Locate
from quantize.gate.write import Candidate, folder_name
from quantize.recipe.files import shipped_recipes
from quantize.recipe.recipe import Recipe, load_recipe

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Target:
    """What an argument means: a checkpoint, or a recipe that has yet to be converted."""

    name: str
    """Of its entry in the file."""
    folder: Path | None
    recipe: Recipe | None
    written: str
    """How the file names its folder or recipe."""


def targets_of(names: Sequence[str], base: Path, locate: Locate) -> list[Target]:
    """What arguments mean: folders, recipes (a shipped name, or a file), Hub ids.

    base: the folder of the gate file. UsageError for what is none of them, or given twice.
    """
    found = [_target(name, base, locate) for name in names]
    by_name: dict[str, list[Target]] = {}
    for target in found:
        by_name.setdefault(target.name, []).append(target)
    out = []
    for target in found:
        alike = by_name[target.name]
        if len({one.written for one in alike}) < len(alike):
            raise UsageError(f"{target.written} is given twice; name each checkpoint once")
        out.append(dataclasses.replace(target, name=target.written) if len(alike) > 1 else target)
    return out


def _target(name: str, base: Path, locate: Locate) -> Target:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return Target(
            os.path.basename(os.path.abspath(folder)), folder, None, folder_name(folder, base)
        )
    shipped = [file.stem for file in shipped_recipes()]
    if folder.suffix in (".yaml", ".yml") or name in shipped:
        recipe = load_recipe(name)
        file = folder_name(folder, base) if folder.is_file() else recipe.name
        return Target(recipe.name, None, recipe, file)
    if HUB_ID.fullmatch(name) and (there := locate(name)) is not None:
        return Target(name.rpartition("/")[2].partition("@")[0], there, None, name)
    raise UsageError(
        f"{show_value(name)}: no such folder and no recipe; {close(name, shipped)}give checkpoint "
        "folders, recipes or Hub ids (org/name)"
    )


def candidates_of(
    targets: Sequence[Target],
    parent: Path,
    settings: Settings,
    *,
    device: torch.device,
    progress: Progress = lambda what, done, total: None,
    parents: ParentCache | None = None,
) -> list[Candidate]:
    """Measure all targets against their parent in one run; recipes are converted into a temporary
    folder before. Raises PqError subclasses."""
    dtype: torch.dtype = getattr(torch, settings.dtype)
    with tempfile.TemporaryDirectory(prefix="pq-gate-") as scratch:
        folders = []
        for i, target in enumerate(targets):
            folder = target.folder
            if folder is None:
                assert target.recipe is not None
                folder = Path(scratch) / str(i)
                made = Request(parent, target.recipe, folder, device, dtype)
                convert(made, _named(target.name, progress))
            folders.append(folder)
        measured = measure(
            folders,
            parent,
            Protocol(settings.protocol, settings.seqlen, settings.context),
            dataset=settings.dataset,
            text_field=settings.text_field,
            chat_template=settings.chat_template,
            max_windows=settings.max_windows,
            bos=settings.bos,
            device=device,
            dtype=dtype,
            numerics=settings.numerics,
            progress=progress,
            parents=parents,
        )
    return [
        Candidate(
            target.name,
            dataclasses.asdict(found.figures),
            folder=None if target.folder is None else target.written,
            recipe=None if target.recipe is None else target.written,
        )
        for target, found in zip(targets, measured, strict=True)
    ]


def _named(name: str, progress: Progress) -> Progress:
    return lambda what, done, total: progress(f"{name}: {what}", done, total)
