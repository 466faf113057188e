"""What an output says of itself in config.json, and what its format cannot hold."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from quantize.convert.plan import Plan
from quantize.convert.state import State
from quantize.formats.compressed_tensors import lost, quantization_config
from quantize.formats.native import native_config
from quantize.model.arch import ROUTERS, ExpertSizes
from quantize.model.moe import TopK


def output_config(plan: Plan, state: State) -> dict[str, Any]:
    """config.json of the output."""
    config = plan.basis.config(plan.source.config, plan.shape)
    linears = plan.skeleton.linears()
    for stage in plan.recipe.stages:
        config, linears = stage.config(config), stage.linears(linears)
    section = _quantization_config(plan, state, config, linears)
    return config if section is None else config | {"quantization_config": section}


def _quantization_config(
    plan: Plan, state: State, config: dict[str, Any], linears: Collection[str]
) -> dict[str, Any] | None:
    """How the output is packed, attends and routes; None where any loader gets that right without
    being told."""
    routers = [f"{ffn}.{router}" for ffn in state.routing for router in ROUTERS]
    alone = [name for name in (plan.arch.head, *linears, *routers) if name not in state.schemes]
    if plan.recipe.format != "pq":
        return quantization_config(state.schemes, alone) if state.schemes else None
    routing = {}
    if state.routing:
        sizes = ExpertSizes.of(config)
        usual = TopK(sizes.top_k, sizes.renormalize)
        routing = {name: policy for name, policy in state.routing.items() if policy != usual}
    if not (state.schemes or plan.attention or state.rotated_inputs or routing):
        return None
    return native_config(state.schemes, alone, plan.attention, state.rotated_inputs, routing)


def lost_in(plan: Plan, state: State) -> list[str]:
    """What the recipe asks for and its format cannot hold."""
    if plan.recipe.format == "pq":
        return []
    experts = []
    if plan.arch.experts:
        inside = f".{plan.arch.experts.routed}."
        experts = [name for name in plan.skeleton.linears() if inside in name]
    return lost(plan.attention is not None, {state.schemes.get(name) for name in experts})
