"""The reference model, and its conversions as drafts."""

from __future__ import annotations

from pathlib import Path

import torch

from quantize.conversion.loop import convert
from quantize.conversion.request import Request
from quantize.recipe.overrides import with_stage_fields
from quantize.recipe.recipe import load_recipe

REFERENCE = Path(__file__).parents[2] / "eval" / "reference-model"


def rounded(folder: Path, bits: int) -> Path:
    """The reference model, rounded to nearest."""
    recipe = with_stage_fields(load_recipe("rtn"), [f"bits={bits}"])
    convert(Request(REFERENCE, recipe, folder, torch.device("cpu"), torch.float32))
    return folder


def docstrings(file: Path) -> Path:
    """Text of the kind that the reference model knows; cheaper to read than the built-in set."""
    methods = [getattr(kind, name) for kind in (str, bytes, list, dict, set) for name in dir(kind)]
    file.write_text("\n\n".join(m.__doc__ for m in methods if m.__doc__), encoding="utf-8")
    return file
