"""All that a conversion knows between two blocks, as JSON and tensors, and back."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from quantize.block.walk import Streams
from quantize.convert.allocation import Allocation
from quantize.convert.conversion import Conversion
from quantize.cost.peak import Cost
from quantize.formats.native import scheme_from_json
from quantize.formats.routing import policy_from_json
from quantize.recipe.recipe import Recipe

_NUMBERS = ("stored_bits", "weights", "source_bytes", "untied_head_bytes")


def snapshot(run: Conversion, streams: Streams[str] | None) -> tuple[dict[str, Any], Iterator[tuple[str, Tensor]]]:
    """Facts (JSON data) and named tensors from which `restored` makes an equal conversion.

    streams: what enters the next block; None where no stage needs it, and before block 0, where it is embedded anew.
    """
    statistics, tensors = run.statistics.kept()
    layouts = list(dict.fromkeys(run.schemes.values()))
    places = {layout: i for i, layout in enumerate(layouts)}
    facts = {
        "recipe": run.request.recipe.model_dump(mode="json"),
        "allocation": _allocation_as_json(run.allocation) if run.allocation else None,
        "layouts": [layout.as_json([]) for layout in layouts],
        "schemes": {name: places[scheme] for name, scheme in run.schemes.items()},
        "rotated_inputs": run.rotated_inputs,
        "report": run.report,
        "routing": {name: policy.as_json() for name, policy in run.routing.items()},
        "costs": {name: asdict(cost) for name, cost in run.costs.items()},
        "statistics": statistics,
        "numbers": {name: getattr(run, name) for name in _NUMBERS},
        "streams": None,
    }
    if streams is not None:
        facts["streams"] = {"dropped": streams.dropped, "names": list(streams.batches)}
    return facts, itertools.chain(tensors.items(), _hidden(streams))


def _hidden(streams: Streams[str] | None) -> Iterator[tuple[str, Tensor]]:
    for name, batches in streams.batches.items() if streams else ():
        for i, hidden in enumerate(batches):
            yield f"{name}.{i:06d}", hidden


def restored(
    run: Conversion, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[Conversion, Streams[str] | None]:
    """Undo `snapshot`. run: a fresh conversion of the same request."""
    recipe = Recipe.model_validate_json(json.dumps(facts["recipe"]))
    out = Conversion(replace(run.request, recipe=recipe), run.source, run.arch, run.shape, run.skeleton)
    out.allocation = _allocation(facts["allocation"], recipe) if facts["allocation"] else None
    layouts = [scheme_from_json(layout) for layout in facts["layouts"]]
    out.schemes = {name: layouts[place] for name, place in facts["schemes"].items()}
    out.rotated_inputs = list(facts["rotated_inputs"])
    out.report = dict(facts["report"])
    out.routing = {name: policy_from_json(policy) for name, policy in facts["routing"].items()}
    out.costs = {name: Cost(**cost) for name, cost in facts["costs"].items()}
    out.statistics.restore(facts["statistics"], tensors)
    for name, number in facts["numbers"].items():
        setattr(out, name, number)
    return out, _streams(out, facts["streams"], tensors)


def _streams(run: Conversion, facts: Mapping[str, Any] | None, tensors: Mapping[str, Tensor]) -> Streams[str] | None:
    if facts is None:
        return None
    batches = {
        stream: run.keep(
            tensors[name].to(run.request.device) for name in sorted(tensors) if name.startswith(f"{stream}.")
        )
        for stream in facts["names"]
    }
    return Streams(batches, run.request.ranks, facts["dropped"])


def _allocation_as_json(found: Allocation) -> dict[str, Any]:
    values = {name: getattr(found, name) for name in ("target", "bits_per_weight", "error", "bits", "promoted")}
    # A list of pairs, because JSON has no whole numbers as keys.
    return values | {"errors": {name: list(errors.items()) for name, errors in found.errors.items()}}


def _allocation(facts: Mapping[str, Any], recipe: Recipe) -> Allocation:
    errors = {name: dict(pairs) for name, pairs in facts["errors"].items()}
    return Allocation(recipe=recipe, **{**facts, "promoted": tuple(facts["promoted"]), "errors": errors})
