"""Which of the ways to serve a model to take, and what to say of each as plain data.

The order: at least four bits before fewer, whose loss is of another size; then fewer GPUs; then engines
as they are before those that need pq beside them; then speed, where a twentieth does not count; then
the least loss that we measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from quantize.recommend.target import Target
from quantize.recommend.ways import Asked, Output, Way, way

_ALIKE = 1.05
"""Times the fastest that count as fast."""


@dataclass(frozen=True)
class Recommendation:
    """All ways that were looked at on one target."""

    asked: Asked
    target: Target
    plain: Way
    """The model as it is."""
    ways: tuple[Way, ...]
    chosen: Way | None
    """None: nothing fits."""


def recommend(asked: Asked, target: Target, outputs: Sequence[Output]) -> Recommendation:
    """Look at all outputs on a target. outputs: as `outputs_of` has them, for its recipes at least."""
    names = {name: place for place, name in enumerate(target.recipes)}
    plain, *others = (
        way(output, target, asked)
        for output in outputs
        if output.recipe is None or output.name in names
    )
    others.sort(key=lambda one: names[one.output.name])
    return Recommendation(asked, target, plain, tuple(others), chosen(others))


def chosen(ways: Sequence[Way]) -> Way | None:
    """The way to take; None where none runs."""
    able = [one for one in ways if one.count is not None]
    if not able:
        return None
    least = min(_tier(one) for one in able)
    able = [one for one in able if _tier(one) == least]
    fewest = min(one.count or 0 for one in able)
    able = [one for one in able if one.count == fewest]
    stock = [one for one in able if not one.runner.install]
    able = stock or able
    fastest = min(seconds(one) for one in able)
    able = [one for one in able if seconds(one) <= _ALIKE * fastest]
    return min(able, key=lambda one: math.inf if one.kld is None else one.kld)


def _tier(one: Way) -> int:
    return max(0, 4 - one.output.bits)


def seconds(one: Way) -> float:
    """Of a request: its prompt alone, then its answer with all sequences at full length; 0 where times
    are not known, so that all are alike."""
    if one.option is None or one.first is None or one.each is None:
        return 0.0
    return one.first + one.option.demand.output * one.each


def as_json(found: Recommendation) -> dict[str, Any]:
    """Everything but the commands; sizes in bytes, times in seconds."""
    return {
        "target": found.target.name,
        "gpus_at_most": found.target.most if found.target.gpu else None,
        "memory": found.target.memory,
        "as_it_is": way_json(found.plain),
        "ways": [way_json(one) for one in found.ways],
        "chosen": None if found.chosen is None else found.chosen.output.name,
    }


def way_json(one: Way) -> dict[str, Any]:
    """One way."""
    recipe = one.output.recipe
    return {
        "name": one.output.name,
        "recipe": None if recipe is None else recipe.name,
        "settings": list(one.output.settings),
        "engine": one.runner.engine,
        "install": list(one.runner.install),
        "weights": one.weights,
        "kv_cache": one.cache,
        "gpus": one.count,
        "first_token": one.first,
        "each_token": one.each,
        "measured": [asdict(figures) for figures in one.output.losses.values()],
        "why_not": one.why_not,
    }
