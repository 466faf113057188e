"""Where passes through a block wait for linears to be looked at."""

from __future__ import annotations

from quantize.conversion.plan import Plan
from quantize.methods.encode import Encode


def waits_before(plan: Plan, index: int) -> frozenset[str]:
    """First linears of the groups of block `index` whose inputs some stage looks at, each with all
    the text."""
    arch = plan.skeleton.block_arch(index)
    found = set()
    for stage in plan.recipe.stages:
        if not stage.needs_inputs or stage.kind in ("cache", "restructure"):
            continue
        for group in arch.calibration_order:
            names = (f"{arch.blocks}.{index}.{name}" for name in group)
            if not isinstance(stage, Encode) or any(map(stage.selects, names)):
                found.add(group[0])
    return frozenset(found)
