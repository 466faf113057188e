"""What engines will not serve of an output, told before any work is done and once more at its end."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from quantize.conversion.allocation_groups import place_of
from quantize.conversion.head import head_scheme
from quantize.conversion.plan import Plan
from quantize.errors import RecipeError
from quantize.formats.engines import VLLM
from quantize.formats.scheme import AnyScheme
from quantize.formats.vllm import Unserved
from quantize.methods.encode import Encode
from quantize.model.arch import Architecture
from quantize.model.roles import role_by_name
from quantize.recipe.serving import unserved_by

log = logging.getLogger(__name__)

_FUSED = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}
_LATENT = {"q_a_proj": "qkv_a", "kv_a_proj_with_mqa": "qkv_a"}
"""What vLLM puts side by side, by role and by name; other linears that share an input (the gate of
an attention) it leaves apart."""


def foretell_roughly(plan: Plan, aloud: bool = True) -> None:
    """The same from the recipe alone, where planning has yet to tell which linears there will be."""
    lines = unserved_by(plan.recipe)
    if plan.request.strict_serving:
        _require_served(plan, lines)
    for line in lines if aloud else ():
        log.warning("%s", line)


def foretell(plan: Plan, known: Iterable[Unserved] = (), aloud: bool = True) -> list[Unserved]:
    """Log what vLLM would refuse of the output, as far as the recipe and sizes tell; returns it.

    known: what was said already. aloud: whether to say the rest. RecipeError where the request is
    strict and something is refused.
    """
    lines = unserved(plan, expected_schemes(plan))
    if plan.request.strict_serving:
        _require_served(plan, lines)
    for line in lines if aloud else ():
        if line not in known:
            log.warning("%s", line)
    return lines


def _require_served(plan: Plan, lines: Iterable[Unserved]) -> None:
    """RecipeError with a line for each thing that no GPU serves."""
    recipe = plan.recipe
    if not plan.format.served:
        raise RecipeError(
            f"recipe {recipe.name}: --strict-serving: {VLLM} does not read format: {recipe.format}; "
            "set format to compressed-tensors"
        )
    if problems := [str(line) for line in lines if line.refused]:
        raise RecipeError(
            "\n".join(f"recipe {recipe.name}: --strict-serving: {text}" for text in problems)
        )


def unserved(plan: Plan, schemes: Mapping[str, AnyScheme]) -> list[Unserved]:
    """What vLLM refuses of an output with these linears packed, by full name."""
    shapes = {plan.arch.head: (plan.shape.vocab, plan.shape.hidden), **linears_of(plan)}
    sets = fused(plan.arch, shapes)
    return plan.format.unserved(schemes, shapes, sets, routed(plan, shapes))


def expected_schemes(plan: Plan) -> dict[str, AnyScheme]:
    """How every linear will be packed, by full name, as far as stages and sizes decide that."""
    arch, linears = plan.arch, linears_of(plan)
    out: dict[str, AnyScheme] = {}
    left = dict(linears)
    for stage in plan.recipe.stages:
        if not isinstance(stage, Encode):
            continue
        blocks: dict[str, dict[str, tuple[int, int]]] = {}
        for name in [name for name in left if stage.selects(name)]:
            block, inside = place_of(arch, name)
            blocks.setdefault(block, {})[inside] = left.pop(name)
        for block, shapes in blocks.items():
            found: Any = stage.schemes(plan.skeleton.block_arch(int(block)), shapes)
            out |= {f"{arch.blocks}.{block}.{name}": scheme for name, scheme in found.items()}
    if plan.recipe.head_bits is not None:
        out[arch.head] = head_scheme(plan.recipe.head_bits, plan.shape.hidden)
    return out


def fused(arch: Architecture, names: Iterable[str]) -> list[tuple[str, ...]]:
    """Linears by full name, in experts as well, of which vLLM makes one matrix: q, k and v, gate and
    up, and the two that begin latent attention, where they stand side by side and share an input."""
    place = {
        name.rpartition(".")[2]: (at, kind)
        for at, group in enumerate(arch.calibration_order)
        for name in group
        if (kind := _FUSED.get(role_by_name(name)) or _LATENT.get(name.rpartition(".")[2]))
    }
    sets: dict[tuple[str, tuple[int, str]], list[str]] = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        if last in place:
            sets.setdefault((parent, place[last]), []).append(name)
    return [tuple(found) for found in sets.values() if len(found) > 1]


def routed(plan: Plan, names: Iterable[str]) -> list[tuple[str, ...]]:
    """Linears by full name, in sets of the routed experts of a block."""
    sets: dict[str, list[str]] = {}
    for name in names:
        if name.startswith(f"{plan.arch.blocks}."):
            block, inside = place_of(plan.arch, name)
            if plan.skeleton.block_arch(int(block)).is_routed(inside):
                sets.setdefault(block, []).append(name)
    return [tuple(found) for found in sets.values()]


def linears_of(plan: Plan) -> dict[str, tuple[int, int]]:
    """[N, K] of the linears of the output's blocks by full name."""
    linears = plan.skeleton.linears()
    for stage in plan.recipe.stages:
        linears = stage.linears(linears)
    return linears
