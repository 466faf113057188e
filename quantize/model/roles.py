"""Roles of a block's linears told from names alone, whatever number of experts there is."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Literal, get_args

from quantize.model.arch import Architecture, Role

ROLES: tuple[Role, ...] = get_args(Role)
"""All roles, in the order in which a block computes them."""
ROUTER: Literal["router"] = "router"
"""Role of a linear that decides how much of an expert a token gets."""

_SYNONYMS: Mapping[str, Role] = {
    "q_proj": "q",
    "q_lin": "q",
    "query": "q",
    "wq": "q",
    "k_proj": "k",
    "key": "k",
    "wk": "k",
    "v_proj": "v",
    "value": "v",
    "wv": "v",
    "o_proj": "o",
    "out_proj": "o",
    "wo": "o",
    "qkv_proj": "qkv",
    "query_key_value": "qkv",
    "Wqkv": "qkv",
    "c_attn": "qkv",
    "attn_qkv": "qkv",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "gate_up_proj": "gate_up",
    "fc1": "up",
    "c_fc": "up",
    "fc_in": "up",
    "dense_h_to_4h": "up",
    "fc2": "down",
    "fc_out": "down",
    "dense_4h_to_h": "down",
}
"""Last part of a linear's name → its role, as families call it. `w1` and its kind follow below."""
_GATED: Mapping[str, Role] = {"w1": "gate", "w3": "up", "w2": "down"}
_PLAIN: Mapping[str, Role] = {"w1": "up", "w2": "down"}
_ROUTERS = re.compile(
    r".*(?:mlp|moe|ffn|feed_forward|experts?)\.(?:gate|router|shared_expert_gate)(?:\..*)?"
)


def role_by_name(name: str, beside: Collection[str] = ()) -> Role:
    """Role of a linear as families call it; `other` for a name that none of them uses.

    beside: the linears around it, by which `w1` beside `w3` gates and alone does not.
    """
    parent, _, last = name.rpartition(".")
    if last in _GATED:
        gated = f"{parent}.w3" in beside or not beside
        return _GATED[last] if gated else _PLAIN.get(last, "other")
    if last in ("dense", "c_proj"):
        return "o" if "att" in parent else "down"
    return _SYNONYMS.get(last, "other")


def is_router(name: str, least: int) -> bool:
    """Whether a linear decides how much of something a token gets, by its name or by how few outputs
    or inputs it has (least: the fewer), such as those that mix streams (AltUp)."""
    if role_by_name(name) != "other":
        return False
    return least < _FEW or bool(_ROUTERS.fullmatch(name))


_FEW = 16
"""Rows or columns of a matrix so small that nothing is saved by rounding it, while much may hang on it."""


def splits_inputs(name: str) -> bool:
    """Whether engines cut the inputs of the linear of this name among GPUs, and not its outputs: it
    writes to the residual stream, and its inputs are what others, cut by outputs, computed."""
    return role_by_name(name) in ("o", "down")


def role_of(name: str) -> Role | Literal["router"] | None:
    """Role of a linear by its name within a block, in an expert as in a dense FFN;
    None for one that has none."""
    role = role_by_name(name)
    if role != "other":
        return role
    return ROUTER if _ROUTERS.fullmatch(name) else None


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
    set_of = packing_of(arch)
    sets: dict[tuple[str, int], list[str]] = {}
    for name in names:
        sets.setdefault(set_of(name), []).append(name)
    return [tuple(found) for found in sets.values()]


def packing_of(arch: Architecture) -> Callable[[str], tuple[str, int]]:
    """What linears of one block, by their names in it, have in common that are packed alike (see
    `packed_alike`)."""
    place = {name: i for i, group in enumerate(arch.calibration_order) for name in group}

    def of(name: str) -> tuple[str, int]:
        if arch.is_routed(name):
            return "routed", -1
        return arch.expert_of(name) or "", place.get(name, place.get(arch.dense_name(name), -1))

    return of
