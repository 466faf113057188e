"""The linear that lost most in a conversion, and what gives it more: told with figures, so that a
command can be made of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from quantize.conversion.plan import Plan
from quantize.conversion.serving import fused
from quantize.conversion.state import State
from quantize.methods.encode import Encode, IntEncode

_ERRORS = ("output_error", "weight_error")
"""Facts that tell how much a linear lost, the better one first."""
_MORE_BITS = 8
_TWICE = 2.0
"""A target leaves room for the linear and as many weights again: those that suffer next."""
_FITTED = {False: "gptq", True: "fireq-linear"}
"""Recipe that fits weights to their inputs, by whether inputs are FP8: for one that does not."""


@dataclass(frozen=True)
class Remedy:
    """The linear with the largest relative squared error, and what to do about it."""

    name: str
    error: str
    """Which error: of outputs on calibration text, or of weights where that is all that is known."""
    value: float
    median: float
    """Over all linears of which that error is known."""
    target_bpw: float | None = None
    """A target with room for 8 bits in it; None where its recipe has none to choose."""
    ignore: tuple[str, ...] = ()
    """Else: patterns that leave it and what is fused with it 16-bit."""
    method: str | None = None
    """The stage that these belong to."""
    recipe: str | None = None
    """A recipe that fits it to its inputs, where this one does not."""

    def as_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self) | {"ignore": list(self.ignore)}


def remedy_of(plan: Plan, state: State) -> Remedy | None:
    """What helps the linear that lost most; None where no linear lost anything that is known."""
    for error in _ERRORS:
        found = {
            name: float(facts[error])
            for name, facts in state.report.items()
            if name in state.schemes and isinstance(facts.get(error), int | float)
        }
        if found:
            break
    else:
        return None
    # NaN is above all.
    name = max(found, key=lambda name: math.inf if math.isnan(found[name]) else found[name])
    told = Remedy(name, error, found[name], sorted(found.values())[len(found) // 2])
    if not told.value > 0:
        return None
    return _with_help(plan, state, told)


def _with_help(plan: Plan, state: State, told: Remedy) -> Remedy:
    stages = plan.request.recipe.stages
    stage = next((s for s in stages if isinstance(s, Encode) and s.selects(told.name)), None)
    if stage is None:  # the head: its bits are a field of the recipe
        return told
    changes: dict[str, Any] = {}
    fitted = any(one.needs_inputs for one in stages)
    if isinstance(stage, IntEncode) and plan.format.served and not fitted:
        changes["recipe"] = _FITTED[stage.fp8]
    shapes = plan.skeleton.linears()
    sizes = {n: math.prod(shapes[n]) for n in state.schemes if n in shapes}
    mates = _mates(plan, state.schemes, told.name)
    restructured = any(one.kind == "restructure" for one in stages)
    if isinstance(stage, IntEncode) and stage.bits < _MORE_BITS and not restructured and sizes:
        more = _TWICE * (_MORE_BITS - stage.bits) * sum(sizes.get(n, 0) for n in mates)
        target = state.bits_per_weight + more / sum(sizes.values())
        changes["target_bpw"] = min(math.ceil(target * 100) / 100, float(_MORE_BITS))
    else:
        changes |= {"ignore": (*stage.ignore, *mates), "method": stage.method}
    return Remedy(told.name, told.error, told.value, told.median, **changes)


def _mates(plan: Plan, names: Mapping[str, object], name: str) -> Sequence[str]:
    """The linear, and those that engines fuse with it, which must be packed alike."""
    return next((group for group in fused(plan.arch, names) if name in group), (name,))
