"""Which linears get the same bits, and how experts are named together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from quantize.model.roles import packing_of

if TYPE_CHECKING:
    from quantize.model.arch import Architecture


def tied_groups(
    arch: Architecture, stages: Mapping[str, int], tie_inputs: bool
) -> Iterator[tuple[str, ...]]:
    """Linears that must get the same bits: those of one input and one stage, or each one alone.

    All linears of a block's routed experts go together: vLLM refuses experts
    that are not all of one scheme.
    """
    if not tie_inputs:
        yield from ((name,) for name in stages)
        return
    set_of = packing_of(arch)
    groups: dict[tuple[str, str, int, int], list[str]] = {}
    for name, stage in stages.items():
        block, inside = place_of(arch, name)
        groups.setdefault((block, *set_of(inside), stage), []).append(name)
    yield from map(tuple, groups.values())


def expert_patterns(arch: Architecture, names: Iterable[str]) -> dict[str, set[str]]:
    """Layer pattern of the routed experts of a block → the linears that it matches, for
    every block that has any."""
    out: dict[str, set[str]] = {}
    for name in names:
        block, inside = place_of(arch, name)
        if arch.experts is not None and arch.is_routed(inside):
            out.setdefault(f"{arch.blocks}.{block}.{arch.experts.routed}.*", set()).add(name)
    return out


def place_of(arch: Architecture, name: str) -> tuple[str, str]:
    """Full name of a linear → (number of its block, its name there)."""
    block, _, inside = name.removeprefix(f"{arch.blocks}.").partition(".")
    return block, inside
