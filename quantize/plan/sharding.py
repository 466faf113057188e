"""How vLLM spreads the tensors of one decoder block, and those around it, over tensor-parallel GPUs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from quantize.inspect.inspection import DecoderBlock, Linear, Other
from quantize.plan.served import WeightPart

EXPERT = re.compile(r"(?:^|\.)experts\.(?:\d+\.)?")
"""In the name of a routed expert's linear or stack."""
_VOCAB_PAD = 64
"""Rows to whose multiple vLLM fills embedding and head."""
_DOWN = ("o", "down")
"""Roles whose inputs are spread, and whose outputs are summed over GPUs."""
_WHOLE = re.compile(r"q_a_proj|kv_a_proj|fused_qkv_a|indexer|shared_expert_gate")
"""Linears of known models that every GPU holds."""
_BY_HEADS = re.compile(r"(?:^|\.)(?:q_b_proj|kv_b_proj)$")
"""Linears of latent attention whose outputs are heads."""


@dataclass(frozen=True)
class Routing:
    """Routed experts of a model."""

    experts: int
    active: float
    """How many a token visits."""


def linear_parts(
    linear: Linear, heads: int, kv_heads: int, routing: Routing | None
) -> Iterator[WeightPart]:
    """A linear's parts that are sharded alike. Plain floats are counted in 16 bits, in which they
    are served."""
    size = served_bytes(linear)
    rows = linear.shape[0] if linear.shape else 0
    if EXPERT.search(linear.name) and routing:
        yield _expert(linear, size, routing)
    elif _WHOLE.search(linear.name) or linear.role == "router":
        yield WeightPart("what every GPU holds", size)
    elif linear.role == "q" or _BY_HEADS.search(linear.name):
        yield WeightPart("query heads", size, heads)
    elif linear.role in ("k", "v"):
        yield WeightPart("key and value heads", size, kv_heads, cut="repeat")
    elif linear.role == "qkv":
        keys = round(size * 2 * kv_heads / (heads + 2 * kv_heads))
        yield WeightPart("query heads", size - keys, heads)
        yield WeightPart("key and value heads", keys, kv_heads, cut="repeat")
    elif linear.role == "o":
        yield WeightPart("query heads", size, heads)
    elif linear.role in ("gate", "up", "gate_up") and rows:
        width = rows // (2 if linear.role == "gate_up" else 1)
        yield WeightPart("channels of the FFN", size, width)
    elif linear.role == "down" and linear.shape:
        yield WeightPart("groups of the FFN's channels", size, _groups(linear))
    else:
        yield WeightPart(OTHERS, size)


OTHERS = "linears of no known role"
"""Name of the part whose linears every GPU is taken to hold whole."""


def _groups(linear: Linear) -> int:
    """Pieces of a linear whose inputs are spread: a group that shares a scale is not cut."""
    assert linear.shape is not None
    K, group = linear.shape[1], linear.group_size or 1
    return max(1, K // (1 if group >= K else group))


def _expert(linear: Linear, size: int, routing: Routing) -> WeightPart:
    """A linear of one expert, or of all where they are stored as one."""
    count, active = routing.experts, routing.active
    if linear.shape is None:
        return WeightPart("routed experts", size, None, count, active)
    if linear.role in _DOWN:
        return WeightPart("groups of the experts' channels", size, _groups(linear), count, active)
    width = linear.shape[0] // (2 if linear.role == "gate_up" else 1)
    return WeightPart("channels of the experts", size, width, count, active)


def served_bytes(linear: Linear) -> int:
    """Bytes of a linear as it is served: as stored, but in 16 bits what is stored in more."""
    if not linear.quantized and linear.weights is not None:
        return min(linear.bytes, 2 * linear.weights)
    return linear.bytes


def other_parts(other: Other, routing: Routing | None) -> Iterator[WeightPart]:
    """Parts of a tensor of a block that is no linear's: norms and biases, and stacks of experts."""
    size = min(other.bytes, 2 * math.prod(other.shape)) if _is_float(other) else other.bytes
    if EXPERT.search(other.name) and routing and len(other.shape) > 2:
        down = "down" in other.name
        # Stacks are stored [experts, outputs, inputs] or the other way round; both sides are even.
        yield WeightPart(
            "channels of the experts",
            size,
            _channels(other, down),
            experts=routing.experts,
            active=routing.active,
        )
    else:
        yield WeightPart("what every GPU holds", size)


def _channels(stack: Other, down: bool) -> int | None:
    """Channels between gate, up and down of a stack, of whichever side they are."""
    _, first, last = stack.shape[:3]
    if down:
        return math.gcd(first, last)
    return math.gcd(first, last) // (2 if math.gcd(first, last) % 2 == 0 else 1)


def _is_float(other: Other) -> bool:
    return other.dtype in ("F32", "F64", "BF16", "F16")


def block_parts(
    block: DecoderBlock, heads: int, kv_heads: int, routing: Routing | None
) -> list[WeightPart]:
    """Everything of one decoder block."""
    own = _own_routing(block) or routing
    parts = [p for x in block.linears for p in linear_parts(x, heads, kv_heads, own)]
    return parts + [p for x in block.others for p in other_parts(x, own)]


def _own_routing(block: DecoderBlock) -> Routing | None:
    """Of a block whose experts pq made; a threshold is taken to open half of them."""
    if not block.routing:
        return None
    found = {
        int(match[1])
        for x in block.linears
        if (match := re.search(r"(?:^|\.)experts\.(\d+)\.", x.name))
    }
    k = block.routing.get("k")
    count = max(1, len(found))
    return Routing(count, k if isinstance(k, int) else count / 2)


def vocabulary(name: str, size: int, rows: int, looked_up: bool) -> WeightPart:
    """Embedding or head: rows are filled up to a multiple of 64, then spread.

    size: bytes as stored, of `rows` rows.
    """
    padded = -(-rows // _VOCAB_PAD) * _VOCAB_PAD
    return WeightPart(name, math.ceil(size * padded / rows), padded, looked_up=looked_up, cut="pad")


def merged(parts: list[WeightPart]) -> tuple[WeightPart, ...]:
    """Parts that are sharded alike as one, in order of size."""
    sizes: dict[tuple[Any, ...], int] = {}
    for part in parts:
        key = (part.name, part.units, part.experts, part.active, part.looked_up, part.cut)
        sizes[key] = sizes.get(key, 0) + part.bytes
    found = [
        WeightPart(name, size, units, experts, active, looked_up, cut)
        for (name, units, experts, active, looked_up, cut), size in sizes.items()
        if size
    ]
    return tuple(sorted(found, key=lambda part: -part.bytes))


def routing_of(facts: Mapping[str, Any]) -> Routing | None:
    """Of the text decoder's own fields, by the names that families have for them."""
    count = _first(facts, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    active = _first(
        facts, "num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_k"
    )
    return Routing(count, active) if count and active and count > 1 else None


def _first(facts: Mapping[str, Any], *names: str) -> int:
    for name in names:
        if isinstance(value := facts.get(name), int) and value > 0:
            return value
    return 0
