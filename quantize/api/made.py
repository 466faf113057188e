"""Conversions of one model with several recipes into one folder, of which those that are there already
are left as they are."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from quantize.api.choices import Assignments
from quantize.api.conversions import chosen_recipe, conversion_request
from quantize.api.places import Progress, Say
from quantize.conversion.loop import convert as run
from quantize.conversion.loop import without_folder
from quantize.errors import PqError, StoppedError, UsageError
from quantize.files.provenance import PROVENANCE, read_provenance
from quantize.model.dequantized import open_source
from quantize.recipe.recipe import Recipe, parse_recipe


@dataclass(frozen=True)
class Asked:
    """How conversions are made: the arguments of `quantize.convert` that matter here."""

    dataset: str | None
    nsamples: int | None
    seqlen: int | None
    set: Assignments | None
    device: str | torch.device
    dtype: str | torch.dtype


@dataclass(frozen=True)
class Made:
    """What became of the recipes."""

    folders: dict[str, Path] = field(default_factory=dict)
    """Recipe → its conversion."""
    errors: dict[str, PqError] = field(default_factory=dict)
    """Recipe → why it has none."""


def convert_missing(
    model: Path,
    recipes: Sequence[str],
    into: Path,
    asked: Asked,
    progress: Progress,
    say: Say,
    stop: Callable[[], bool],
) -> Made:
    """Convert with each recipe that has no conversion in `into` yet, one after the other.

    A recipe that cannot be carried out is left out and told of; StoppedError ends all of it, and the
    same call goes on from there. UsageError, before anything is converted, where a conversion that is
    there is not the one that was asked for, or two recipes would have the same folder.
    """
    made, hashes = Made(), _Hashes(model)
    chosen: dict[str, Recipe] = {}
    for name in recipes:
        recipe = chosen_recipe(
            name, asked.set, dataset=asked.dataset, nsamples=asked.nsamples, seqlen=asked.seqlen
        )
        if (known := chosen.get(recipe.name)) is not None:
            told = (
                "is named twice" if known == recipe else f"has the name of another, {recipe.name}"
            )
            raise UsageError(f"--recipes {name}: {told}; name each once")
        chosen[recipe.name] = recipe
        folder = into / recipe.name
        if (folder / PROVENANCE).is_file():
            _require_alike(folder, recipe, hashes)
            made.folders[recipe.name] = folder
    for name, recipe in chosen.items():
        if name in made.folders:
            say(f"{name}: converted already ({into / name})")
            continue
        try:
            made.folders[name] = _convert(model, recipe, into / name, asked, progress, say, stop)
        except StoppedError:
            raise
        except PqError as err:
            made.errors[name] = err
            say(f"{name}: not converted: {err}")
    return Made({name: made.folders[name] for name in chosen if name in made.folders}, made.errors)


def _convert(
    model: Path,
    recipe: Recipe,
    output: Path,
    asked: Asked,
    progress: Progress,
    say: Say,
    stop: Callable[[], bool],
) -> Path:
    request = conversion_request(
        model,
        recipe,
        output,
        revision=None,
        dataset=None,
        nsamples=None,
        seqlen=None,
        seed=None,
        chat_template=None,
        text_field=None,
        bos=None,
        set=None,
        target_bpw=None,
        work=None,
        resume="auto",
        overwrite=False,
        strict_serving=False,
        check_windows=0,  # the comparison measures it
        max_ram=None,
        max_vram=None,
        device=asked.device,
        dtype=asked.dtype,
        say=say,
    )

    def named(what: str, done: int, total: int) -> None:
        progress(f"{recipe.name}: {what}", done, total)

    run(request, named, stop)
    if request.work is not None:
        shutil.rmtree(request.work, ignore_errors=True)
    return output


class _Hashes:
    """Those of a model's files, computed once, when they are first asked for."""

    def __init__(self, model: Path) -> None:
        self.model = model
        self._found: dict[str, str] = {}

    def all(self) -> dict[str, str]:
        """SHA-256 of each."""
        if not self._found:
            self._found = open_source(self.model).hashes()
        return self._found


def _require_alike(folder: Path, recipe: Recipe, hashes: _Hashes) -> None:
    """UsageError for a conversion with other settings or of another model."""
    found = read_provenance(folder)
    assert found is not None
    differs = ""
    made = parse_recipe(found["recipe"]["resolved"], f"{found['recipe']['name']}.yaml")
    if not _agrees(without_folder(recipe).model_dump(), made.model_dump()):
        differs = "was made with other settings"
    elif found["source"] != hashes.all():
        differs = f"was made of another model than {hashes.model}"
    if differs:
        raise UsageError(f"{folder}: {differs}; remove it, or give another folder with --into")


def _agrees(asked: object, made: object) -> bool:
    """Whether a recipe that was carried out is what was asked for: what that leaves open (None) the
    conversion has found."""
    if asked is None:
        return True
    if isinstance(asked, dict) and isinstance(made, dict):
        return asked.keys() == made.keys() and all(_agrees(asked[k], made[k]) for k in asked)
    if isinstance(asked, list | tuple) and isinstance(made, list | tuple):
        return len(asked) == len(made) and all(map(_agrees, asked, made))
    return asked == made
