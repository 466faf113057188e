"""Whether the patterns of a recipe name anything of the model, and what they may have meant."""

from __future__ import annotations

from collections.abc import Collection

from quantize.errors import ModelError, RecipeError
from quantize.formats.patterns import matches, nearest_pattern
from quantize.methods.encode import Encode
from quantize.model.arch import Architecture
from quantize.model.stored import StoredCheckpoint
from quantize.recipe.recipe import Recipe

_HEAD = "lm_head"
"""What other tools call every head."""


def require_patterns(
    stage: Encode,
    recipe: Recipe,
    source: StoredCheckpoint,
    arch: Architecture,
    linears: Collection[str],
) -> None:
    """ModelError for a pattern of a stage that names nothing of the model, RecipeError for a head
    that is to be packed and left alone.

    `ignore` may name modules without linears that stages encode, which stay as they are anyway.
    linears: full names of those that the stage may encode.
    """
    inside = {home for name in linears for home in _homes(name)}
    modules = {home for name in source.shapes for home in _homes(name)[1:]}
    # A head that is tied to the embedding has no tensor.
    others = {*(modules - inside), arch.head, _HEAD}
    for pattern in (*stage.layers, *stage.ignore):
        if any(matches(name, [pattern]) for name in linears):
            continue
        head = matches(arch.head, [pattern]) or pattern == _HEAD
        if pattern not in stage.ignore or not any(matches(name, [pattern]) for name in others):
            raise ModelError(
                f"recipe stage {stage.method}: pattern '{pattern}' matches no linear of this model"
                f"{_remedy(pattern, head, source, linears)} (names look like {next(iter(linears))})"
            )
        if head and recipe.head_bits is not None:
            raise RecipeError(
                f"recipe {recipe.name}: head_bits: {recipe.head_bits}, but stage {stage.method} has "
                f"'{pattern}' in ignore, which is the head; remove one of them"
            )


def _remedy(
    pattern: str,
    head: bool,
    source: StoredCheckpoint,
    linears: Collection[str],
) -> str:
    if head:
        return "; what becomes of the head is said by head_bits, a field of the recipe"
    for name in linears:
        called = source.output.name(f"{name}.weight").removesuffix(".weight")
        if called != name and matches(called, [pattern]):
            return f"; what is stored as {called} is called {name} here"
    near = nearest_pattern(pattern, linears)
    return f"; did you mean '{near}'?" if near else ""


def _homes(name: str) -> list[str]:
    """A name and those of all modules around it, the innermost first."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
