"""What an output says of itself in config.json, and what its format cannot hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantize.conversion.plan import Plan
from quantize.conversion.serving import linears_of
from quantize.conversion.state import State
from quantize.formats.output import Finished
from quantize.model.arch import CONTAINER, ROUTERS, ExpertSizes
from quantize.model.experts import whole_stacks
from quantize.model.moe import TopK
from quantize.model.transformers_decoder import needs_weights
from quantize.model.transposed import FromConv1D


def output_config(plan: Plan, state: State) -> dict[str, Any]:
    """config.json of the output."""
    config = plan.basis.config(plan.source.config, plan.shape)
    for stage in plan.recipe.stages:
        config = stage.config(config)
    linears = linears_of(plan)
    routers = [f"{ffn}.{router}" for ffn in state.routing for router in ROUTERS]
    outside = [*plan.skeleton.linears_outside(), *plan.source.carried_linears]
    names = dict.fromkeys((plan.arch.head, *linears, *routers, *plan.skeleton.routers(), *outside))
    alone = [name for name in names if name not in state.schemes]
    routing, ours = state.routing, None
    if state.routing and config.get("model_type") != CONTAINER:
        ours = _expert_sizes(next(iter(state.routing)), linears)
    elif state.routing:
        sizes = ExpertSizes.of(config)
        usual = TopK(sizes.top_k, sizes.renormalize)
        routing = {name: policy for name, policy in state.routing.items() if policy != usual}
    finished = Finished(
        state.schemes,
        alone,
        plan.attention,
        state.rotated_inputs,
        routing,
        plan.source.output.in_config,
        ours,
    )
    section = plan.format.config_section(finished)
    if section is None:
        return config
    return config | dict(plan.format.beside_section) | {"quantization_config": section}


def facts_of(plan: Plan, config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of the output with all defaults of the model's class filled in."""
    defaults: dict[str, Any] = plan.skeleton.model.config.to_dict()
    return defaults | dict(config)


def _expert_sizes(ffn: str, linears: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Sizes of the experts that a stage put in the place of an FFN, the same in every block."""
    ends = {name: N for name, (N, _) in linears.items() if name.endswith(".up_proj")}
    routed = [N for name, N in ends.items() if name.startswith(f"{ffn}.experts.")]
    return {"n": len(routed), "size": routed[0], "shared": ends[f"{ffn}.shared_expert.up_proj"]}


def lost_in(plan: Plan, state: State) -> list[str]:
    """What the recipe asks for and its format cannot hold."""
    archs = enumerate(map(plan.skeleton.block_arch, range(plan.shape.n_blocks)))
    experts = [
        f"{arch.blocks}.{index}.{name}"
        for index, arch in archs
        for name in arch.roles
        if arch.is_routed(name)
    ]
    schemes = {state.schemes.get(name) for name in experts}
    lines = plan.format.losses(plan.attention is not None, schemes, _not_stock(plan, state))
    lines += plan.format.model_notes(facts_of(plan, plan.source.config))
    return lines + _rounded_scales(state) + _left_whole(plan)


def _rounded_scales(state: State) -> list[str]:
    """Group scales that the format's float16 does not hold."""
    found = [
        facts["float16_scales"] for facts in state.report.values() if "float16_scales" in facts
    ]
    rounded = sum(one["rounded"] for one in found)
    if not rounded:
        return []
    every, change = sum(one["scales"] for one in found), max(one["change"] for one in found)
    return [
        f"{rounded} of {every} group scales were rounded to float16, by {change:.1e} at most; all "
        "other values are those of the integers"
    ]


def _left_whole(plan: Plan) -> list[str]:
    """Stacks of matrices in blocks that pq knows not to split, which no recipe reaches."""
    place = plan.skeleton.parts.blocks
    known: dict[str, list[str]] = {}
    for name, reason in whole_stacks(plan.skeleton.model.get_submodule(place)).items():
        known.setdefault(reason, []).append(f"{place}.{name}")
    return [
        f"{names[0]}"
        + (f" and {len(names) - 1} more stay" if names[1:] else " stays")
        + f" as stored: {reason}"
        for reason, names in known.items()
    ]


def _not_stock(plan: Plan, state: State) -> list[str]:
    """Why stock transformers does not load the output, in which these linears are packed."""
    why = []
    # Of what a stage made anew, the parent has no module.
    modules = dict(plan.skeleton.model.named_modules())
    if any(isinstance(modules.get(name), FromConv1D) for name in state.schemes):
        why.append("it has Conv1D in the place of linears, which it cannot pack; pq reads it")
    if stacks := plan.source.output.unloadable(state.schemes):
        more = f" and {len(stacks) - 1} more" if len(stacks) > 1 else ""
        why.append(
            f"it knows the experts of this type as stacks alone ({stacks[0]}{more}); pq reads them, "
            "and ignore: ['*.experts.*'] leaves them 16-bit"
        )
    if kind := needs_weights(plan.skeleton.model, state.schemes):
        why.append(f"its own code asks {kind} for weights that packed linears lack; pq reads it")
    return why
