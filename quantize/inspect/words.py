"""Parts of quantization_config in words for people; what is not understood is shown as it stands."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_FLOATS = {"bfloat16": "bfloat16", "e4m3": "FP8 (E4M3)"}


def attention_words(facts: Mapping[str, Any]) -> str:
    """How attention rounds, of pq's own format."""
    try:
        cache = facts["kv_cache"]
        scale = _FLOATS[cache["scale_dtype"]]
        moved = "shifted, rotated and " if facts.get("affine") else ""
        zero = "" if cache["symmetric"] else " and a zero point"
        text = (
            f"keys and values are {moved}kept in {int(cache['bits'])} bits, with a scale in {scale}{zero} for "
            f"every token, head and {int(cache['group_size'])} channels"
        )
        rounded = [name for name in ("query", "probabilities") if facts[name] == "fp8"]
    except (KeyError, TypeError, ValueError):
        return json.dumps(facts)
    names = {"query": "queries", "probabilities": "probabilities"}
    if not rounded:
        return f"{text}; it computes in 16 bits"
    return f"{text}; {' and '.join(names[name] for name in rounded)} are rounded to FP8 (E4M3)"


def routing_words(facts: Mapping[str, Any]) -> str:
    """How tokens find experts, of pq's own format."""
    kind = facts.get("policy")
    if kind == "threshold" and "threshold" in facts:
        return f"a token visits every expert whose score exceeds {facts['threshold']}"
    if kind == "top-k" and isinstance(k := facts.get("k"), int):
        scaled = ", whose weights are scaled to add up to 1" if facts.get("renormalize") else ""
        which = "expert" if k == 1 else f"{k} experts"
        return f"a token visits the {which} of highest score{scaled}"
    return json.dumps(facts)
