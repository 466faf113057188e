"""Roles of a block's linears told from names alone, whatever number of experts there is."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

from quantize.model.arch import Architecture, Role

ROUTER: Literal["router"] = "router"
"""Role of a linear that decides how much of an expert a token gets."""


def role_of(arch: Architecture, name: str) -> Role | Literal["router"] | None:
    """Role of a linear by its name within a block, in an expert as in a dense FFN;
    None for one that has none."""
    parts = arch.experts
    if parts is not None:
        if name in (parts.router, parts.shared_gate):
            return ROUTER
        name = re.sub(
            rf"^(?:{re.escape(parts.routed)}\.\d+|{re.escape(parts.shared)})\.",
            f"{parts.ffn}.",
            name,
        )
    return arch.roles.get(name)


def natural(name: str) -> list[tuple[bool, int, str]]:
    """Sort key of a name that puts `experts.9` before `experts.10`."""
    # More digits than these are no number of ours, and int() refuses very many.
    numbers = [
        int(part) if part.isascii() and part.isdecimal() and len(part) < 10 else -1
        for part in name.split(".")
    ]
    return [
        (number >= 0, number, part) for number, part in zip(numbers, name.split("."), strict=True)
    ]


def packed_alike(arch: Architecture, names: Iterable[str]) -> list[tuple[str, ...]]:
    """Linears of one block, by their names in it, in the sets that loaders want packed alike.

    Those that share an input are one matrix in vLLM; of all routed experts transformers makes one
    tensor, and vLLM refuses any that differ.
    """
    place = {name: i for i, group in enumerate(arch.calibration_order) for name in group}
    sets: dict[tuple[str, int], list[str]] = {}
    for name in names:
        if arch.is_routed(name):
            key = ("routed", -1)
        else:
            at = place.get(name, place.get(arch.dense_name(name), -1))
            key = (arch.expert_of(name) or "", at)
        sets.setdefault(key, []).append(name)
    return [tuple(found) for found in sets.values()]
