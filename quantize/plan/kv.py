"""What keys and values of attention take in a cache, in each type that an engine keeps them in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantize.errors import UsageError
from quantize.formats.kv4 import KvScheme
from quantize.inspect.inspection import DecoderBlock, Linear
from quantize.plan.served import KvLayer


@dataclass(frozen=True)
class KvType:
    """How an engine stores one head of one token."""

    name: str
    """As pq's users write it."""
    vllm: str | None
    """The value of vLLM's --kv-cache-dtype; None: no vLLM without a plugin keeps it."""
    bytes: Callable[[int], float]
    """Of a vector of so many channels, its scale counted."""


# The modes with a scale a token and head put it, in 32 bits, behind the vector (vLLM 0.32,
# v1/attention/backends/triton_attn.py).
KV_TYPES: tuple[KvType, ...] = (
    KvType("bf16", "auto", lambda n: 2.0 * n),
    KvType("fp8", "fp8", lambda n: 1.0 * n),
    KvType("fp8-head", "fp8_per_token_head", lambda n: n + 4.0),
    KvType("int8", "int8_per_token_head", lambda n: n + 4.0),
    KvType("int4", "int4_per_token_head", lambda n: n // 2 + 4.0),
)
_SCALE = 4
"""Bytes of a scale of those modes."""


def kv_type(name: str, config: Mapping[str, Any]) -> KvType:
    """The type of a name; `auto` is what the checkpoint itself asks for.

    config: config.json. UsageError for an unknown name.
    """
    if name != "auto":
        known = {one.name: one for one in KV_TYPES}
        if name not in known:
            raise UsageError(f"KV cache {name!r}: choose one of auto, {', '.join(known)}")
        return known[name]
    section = config.get("quantization_config")
    section = section if isinstance(section, dict) else {}
    attention = section.get("attention")
    if isinstance(attention, dict) and isinstance(attention.get("kv_cache"), dict):
        scheme = KvScheme.from_json(attention["kv_cache"])
        return KvType("pq int4", None, lambda n: float(scheme.record_bytes(n)))
    cache = section.get("kv_cache_scheme")
    asked = str(section.get("kv_cache_quant_algo", "")).upper()
    if (isinstance(cache, dict) and cache.get("num_bits") == 8) or asked == "FP8":
        return KV_TYPES[1]
    return KV_TYPES[0]


def window_of(index: int, facts: Mapping[str, Any]) -> int | None:
    """Tokens that layer `index` looks back; None: all.

    facts: of the text decoder, as transformers' config has them.
    """
    kinds = facts.get("layer_types")
    kind = kinds[index] if isinstance(kinds, list) and index < len(kinds) else None
    if kind == "chunked_attention":
        chunk = facts.get("attention_chunk_size")
        return chunk if isinstance(chunk, int) else None
    window = facts.get("sliding_window")
    slides = kind == "sliding_attention" if kind else _slides(facts)
    return window if slides and isinstance(window, int) and window > 0 else None


def _slides(facts: Mapping[str, Any]) -> bool:
    """Whether all layers slide, where nothing is said of each."""
    return bool(facts.get("use_sliding_window", facts.get("model_type") in ("mistral", "phi3")))


def layer_of(
    block: DecoderBlock, index: int, facts: Mapping[str, Any], kept: KvType
) -> KvLayer | None:
    """What the attention of one block keeps; None for a block that keeps nothing of its own."""
    if isinstance(rank := facts.get("kv_lora_rank"), int):
        return KvLayer(1, _latent(rank + int(facts.get("qk_rope_head_dim") or 0), kept))
    widths = _widths(block.linears, facts)
    if widths is None:
        return _state(facts) if _is_linear(index, facts) else None
    keys, values, heads = widths
    size = kept.bytes(keys // heads) + kept.bytes(values // heads)
    return KvLayer(heads, size, window_of(index, facts))


def _latent(channels: int, kept: KvType) -> float:
    """Of the one vector that latent attention keeps; modes with scales put two behind it."""
    scaled = kept.bytes(channels) % channels and kept.bytes(channels) < 2 * channels
    return kept.bytes(channels) + (_SCALE if scaled else 0)


def _widths(linears: Sequence[Linear], facts: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """(channels of keys, of values, heads of both) that a block's linears make."""
    rows = {x.role: x.shape[0] for x in linears if x.shape and "cross" not in x.name}
    head, heads = head_dim(facts), int(facts.get("num_key_value_heads") or 0)
    heads = heads or int(facts["num_attention_heads"])
    if "k" in rows:
        keys, values = rows["k"], rows.get("v", rows["k"])
    elif "qkv" in rows:
        keys = values = heads * head
    else:
        return None
    wide = int(facts.get("global_head_dim") or head)
    if keys != heads * head:  # layers that attend to all have heads of their own in some models
        heads = int(facts.get("num_global_key_value_heads") or max(1, keys // wide))
    return keys, values, heads if keys % heads == 0 else 1


def head_dim(facts: Mapping[str, Any]) -> int:
    """Channels of a head."""
    own = facts.get("head_dim")
    if isinstance(own, int):
        return own
    return int(facts["hidden_size"]) // max(1, int(facts["num_attention_heads"]))


def _is_linear(index: int, facts: Mapping[str, Any]) -> bool:
    kinds = facts.get("layer_types")
    return isinstance(kinds, list) and index < len(kinds) and kinds[index] == "linear_attention"


def _state(facts: Mapping[str, Any]) -> KvLayer | None:
    """The state of a gated delta rule (Qwen3-Next's names), in 16 bits, that of its convolution
    beside it."""
    names = (
        "linear_num_value_heads",
        "linear_num_key_heads",
        "linear_key_head_dim",
        "linear_value_head_dim",
        "linear_conv_kernel_dim",
    )
    if not all(isinstance(facts.get(name), int) for name in names):
        return None
    values, keys, key_dim, value_dim, kernel = (int(facts[name]) for name in names)
    channels = 2 * keys * key_dim + values * value_dim
    return KvLayer(0, 0.0, None, 2 * (values * key_dim * value_dim + (kernel - 1) * channels))
