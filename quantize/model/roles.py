"""Roles of a block's linears told from names alone, whatever number of experts there is."""

from __future__ import annotations

import re
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
