"""Which group of inputs shares a scale where the one asked for does not divide the inputs, and
how that is told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

GROUPS = (128, 64, 32)
"""Groups that kernels multiply with, ours and other engines': what is taken for one that does not
fit."""
FP8_TILE = 128
"""Rows and inputs of an INT4×FP8 kernel's tile, and its only group."""
WHOLE_ROW = -1
"""The `group_size` by which a recipe asks for one scale a row, as other tools write it."""
ADAPTED = "adapted"
"""The fact of a linear, in the provenance, that says what it got instead of what was asked for."""


def fitting_group(asked: int, inputs: Iterable[int]) -> int | None:
    """The group of linears with these inputs [K]: `asked` where it divides all of them, else the
    largest of `GROUPS` below it that does; None: a whole row shares one scale, as `WHOLE_ROW` asks."""
    if asked == WHOLE_ROW:
        return None
    inputs = list(inputs)
    tried = (asked, *(group for group in GROUPS if group < asked))
    return next((group for group in tried if not any(K % group for K in inputs)), None)


def shard_counts(groups: int, asked: Iterable[int]) -> tuple[int, ...]:
    """Of so many shards of a row, rising, those above 1 in which a row of so many groups has whole
    groups, two at least: a group alone in its shard has the largest scale of it, whatever that is."""
    fine = (count for count in asked if count > 1 and not groups % count and groups > count)
    return tuple(sorted(set(fine)))


def adaptation(
    shape: tuple[int, int], asked: int, group: int | None, lost_fp8: bool
) -> dict[str, Any] | None:
    """The fact `ADAPTED` of a linear [N, K], JSON data; None where it got what was asked for.

    group: what it got, None for whole rows. lost_fp8: whether it was asked to round its inputs to
    FP8, and does not.
    """
    out: dict[str, Any] = {}
    if group != (None if asked == WHOLE_ROW else asked):
        out["group_size"] = {"asked": asked, "used": group}
    if lost_fp8:
        out["activations"] = {"asked": "fp8", "used": "none"}
    return out | {"outputs": shape[0], "inputs": shape[1]} if out else None


def adapted_lines(layers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line for all linears that got the same instead of the same, the most frequent first:
    "12 linears: group 64 instead of 128 (576 inputs)".

    layers: facts by full name, of which any may be missing or of another version.
    """
    found = Counter(line for facts in layers.values() if (line := _line(facts.get(ADAPTED))))
    return [f"{count} linear{'s' * (count > 1)}: {line}" for line, count in found.most_common()]


def _line(fact: Any) -> str | None:
    if not isinstance(fact, dict):
        return None
    parts: list[str] = []
    reasons: list[str] = []
    inputs, outputs = fact.get("inputs"), fact.get("outputs")
    if isinstance(group := fact.get("group_size"), dict):
        asked, used = group.get("asked"), group.get("used")
        got = "one group a row" if used is None else f"group {used}"
        parts.append(f"{got} instead of {'group ' * (used is None)}{asked}")
        if _whole(asked) and _whole(inputs) and fitting_group(asked, [inputs]) == used:
            reasons.append(f"{inputs} inputs")
    if isinstance(fact.get("activations"), dict):
        parts.append("16-bit activations instead of FP8")
        if _whole(inputs) and inputs % FP8_TILE and not reasons:
            reasons.append(f"{inputs} inputs")
        if _whole(outputs) and outputs % FP8_TILE:
            reasons.append(f"{outputs} outputs")
    why = ", ".join(reasons) or "as the linears packed with it"
    return f"{', '.join(parts)} ({why})" if parts else None


def _whole(size: Any) -> TypeGuard[int]:
    return isinstance(size, int) and size > 0
