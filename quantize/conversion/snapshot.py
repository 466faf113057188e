"""All that a conversion knows between two blocks, as JSON and tensors, and back."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from quantize.block.walk import Streams
from quantize.conversion.conversion import Conversion
from quantize.conversion.fields import Codec, Fields, layout
from quantize.conversion.plan import Decisions, Plan
from quantize.conversion.source import hold
from quantize.conversion.state import State
from quantize.formats.registry import scheme_of
from quantize.formats.routing import Policy, policy_from_json
from quantize.formats.scheme import AnyScheme
from quantize.recipe.recipe import Recipe

_FIELDS = Fields(
    {
        AnyScheme: Codec(lambda scheme: scheme.as_json([]), scheme_of),
        Policy: Codec(lambda policy: policy.as_json(), policy_from_json),
        Recipe: Codec(
            lambda recipe: recipe.model_dump(mode="json"),
            # As JSON, because strict types take a list for a tuple only from there.
            lambda facts: Recipe.model_validate_json(json.dumps(facts)),
        ),
    }
)


@dataclass
class _Progress:
    """What is kept, beside the hidden states."""

    decisions: Decisions
    state: State


def state_layout() -> dict[str, dict[str, str]]:
    """Fields of what is kept: what another release kept in other fields cannot be taken up."""
    return {cls.__name__: layout(cls) for cls in (Decisions, State)}


def pack_run(
    run: Conversion, streams: Streams[str] | None
) -> tuple[dict[str, Any], Iterator[tuple[str, Tensor]]]:
    """Facts (JSON data) and named tensors from which `unpack_run` makes an equal conversion.

    streams: what enters the next block; None where no stage needs it, and before block 0, where it
    is embedded anew.
    """
    facts, tensors = _FIELDS.write(_Progress(run.plan.decisions, run.state))
    facts["streams"] = streams and {"dropped": streams.dropped, "names": list(streams.batches)}
    return facts, itertools.chain(tensors.items(), _hidden(streams))


def unpack_run(
    plan: Plan, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[Conversion, Streams[str] | None]:
    """Undo `pack_run`. plan: a fresh one of the same request."""
    progress = _FIELDS.read(_Progress, facts, tensors)
    plan = replace(plan, decisions=progress.decisions)
    return Conversion(plan, progress.state), _streams(plan, facts["streams"], tensors)


def _hidden(streams: Streams[str] | None) -> Iterator[tuple[str, Tensor]]:
    for name, batches in streams.batches.items() if streams else ():
        for i, hidden in enumerate(batches):
            yield f"hidden.{name}.{i:06d}", hidden


def _streams(
    plan: Plan, facts: Mapping[str, Any] | None, tensors: Mapping[str, Tensor]
) -> Streams[str] | None:
    if facts is None:
        return None
    batches = {}
    for stream in facts["names"]:
        names = sorted(name for name in tensors if name.startswith(f"hidden.{stream}."))
        batches[stream] = hold(plan, (tensors[name].to(plan.request.device) for name in names))
    return Streams(batches, plan.request.ranks, facts["dropped"])
