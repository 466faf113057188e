"""Which models llama.cpp runs as pq writes them: names of tensors, and what of config.json matters.

Architectures, names and keys are llama.cpp's own (`llama-arch.cpp`, `gguf/constants.py`). What its graph
of an architecture has built in, and config.json could have otherwise, is refused here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Value = bool | int | float | str
Metadata = dict[str, "Value | list[int] | list[float] | list[str]"]
"""Keys of a file and their values; whole numbers are written as uint32."""

_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LLAMA_NORMS = {"post_attention_layernorm": "ffn_norm"}
_GEMMA_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_ALL = frozenset(_BLOCK.values())
_QKV = frozenset(("attn_q", "attn_k", "attn_v"))
_GEMMA_PERIOD = 6
"""Every so many layers one of Gemma 3's attends to everything, in llama.cpp's code."""
_LARGE_GEMMA = (62, 5376, 32)
"""Layers, width and heads of Gemma 3 27B, the only one whose scores llama.cpp divides otherwise."""


@dataclass(frozen=True)
class Family:
    """Model types that llama.cpp runs by one of its architectures."""

    architecture: str
    block: Mapping[str, str]
    """Modules of a decoder block → tensors of it."""
    biased: frozenset[str] = frozenset()
    """Tensors that may have a bias beside them."""
    pairs_rows: bool = False
    """Whether q and k have the two halves of every head interleaved: RoPE turns neighbours there."""
    norm_offset: float = 0.0
    """What is added to weights of norms."""
    activation: str = "silu"

    def tensor(self, name: str) -> str | None:
        """llama.cpp's name of a tensor with transformers' name; None where it has no such."""
        module, _, part = name.rpartition(".")
        if part == "weight" and module in _OUTSIDE:
            return f"{_OUTSIDE[module]}.weight"
        head, _, rest = module.partition("model.layers.")
        index, _, local = rest.partition(".")
        known = self.block.get(local)
        if head or known is None or not index.isdecimal():
            return None
        fits = part == "weight" or (part == "bias" and known in self.biased)
        return f"blk.{int(index)}.{known}.{part}" if fits else None

    def module(self, tensor: str) -> tuple[str, str] | None:
        """Undo `tensor`: transformers' name of the module, and the part; None where there is none."""
        owner, _, part = tensor.rpartition(".")
        back = {known: module for module, known in _OUTSIDE.items()}
        if owner in back and part == "weight":
            return back[owner], part
        head, _, rest = owner.partition("blk.")
        index, _, known = rest.partition(".")
        inside = {theirs: ours for ours, theirs in self.block.items()}
        if head or known not in inside or not index.isdecimal() or part not in ("weight", "bias"):
            return None
        return f"model.layers.{int(index)}.{inside[known]}", part

    def heads(self, tensor: str, facts: Mapping[str, Any]) -> int | None:
        """How many heads have their rows interleaved in a tensor; None where rows stay in order.

        facts: metadata of the file.
        """
        known = tensor.split(".")[-2]
        if not self.pairs_rows or known not in ("attn_q", "attn_k"):
            return None
        kind = "head_count" if known == "attn_q" else "head_count_kv"
        return int(facts[f"{self.architecture}.attention.{kind}"])


_LLAMA = Family("llama", _BLOCK | _LLAMA_NORMS, _ALL, pairs_rows=True)
FAMILIES: Mapping[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Family("qwen2", _BLOCK | _LLAMA_NORMS, _QKV),
    "qwen3": Family("qwen3", _BLOCK | _LLAMA_NORMS | _HEAD_NORMS),
    "gemma3_text": Family(
        "gemma3",
        _BLOCK | _GEMMA_NORMS | _HEAD_NORMS,
        norm_offset=1.0,
        activation="gelu_pytorch_tanh",
    ),
}
"""By `model_type`."""
BY_ARCHITECTURE: Mapping[str, Family] = {
    family.architecture: family for family in FAMILIES.values()
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a model; ValueError for a type that is not written."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(
            f"models of type {kind!r} are not written for llama.cpp (only "
            f"{', '.join(FAMILIES)}); set format to compressed-tensors"
        )
    return FAMILIES[kind]


def problems(facts: Mapping[str, Any]) -> Iterator[str]:
    """What of a model llama.cpp's graph would compute otherwise, in lines.

    facts: config.json with all defaults of the model's class filled in.
    """
    family = family_of(facts)
    act = facts.get("hidden_activation") or facts.get("hidden_act")
    if act != family.activation:
        yield f"its activation is {act}, and llama.cpp's {family.architecture} has {family.activation}"
    for kind, rope in _ropes(facts).items():
        if rope.get("rope_type", "default") not in ("default", "linear", "llama3"):
            yield f"RoPE of type {rope['rope_type']!r} is not written; only default, linear and llama3"
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            yield "it rotates a part of each head"
        if kind == "sliding_attention" and rope.get("rope_type", "default") != "default":
            yield "its sliding layers have scaled positions, which llama.cpp's have not"
    heads, width = facts["num_attention_heads"], facts["hidden_size"]
    if (
        family.architecture == "qwen2"
        and (facts.get("head_dim") or width // heads) * heads != width
    ):
        yield f"its {heads} heads are not as wide together as the stream of {width}, as qwen2's are"
    if family.architecture == "gemma3":
        yield from _gemma_problems(facts)
    elif facts.get("model_type") == "qwen2" and "sliding_attention" in (
        facts.get("layer_types") or ()
    ):
        yield "some of its layers attend to a window, and llama.cpp's qwen2 to everything"


def _gemma_problems(facts: Mapping[str, Any]) -> Iterator[str]:
    kinds = facts.get("layer_types") or ()
    usual = [
        "sliding_attention" if (index + 1) % _GEMMA_PERIOD else "full_attention"
        for index in range(len(kinds))
    ]
    if list(kinds) != usual:
        yield f"llama.cpp has full attention in every {_GEMMA_PERIOD}th layer, it has it elsewhere"
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if facts.get(key) is not None:
            yield f"{key} is {facts[key]}, which llama.cpp's gemma3 has not"
    if facts.get("use_bidirectional_attention"):
        yield "its attention looks ahead"
    width, heads = facts["hidden_size"], facts["num_attention_heads"]
    large = (facts["num_hidden_layers"], width, heads) == _LARGE_GEMMA
    divisor = width // heads if large else facts["head_dim"]
    if facts.get("query_pre_attn_scalar", divisor) != divisor:
        yield (
            f"query_pre_attn_scalar is {facts['query_pre_attn_scalar']}, and llama.cpp divides by "
            f"the root of {divisor}"
        )


def context(facts: Mapping[str, Any]) -> tuple[int, str | None]:
    """How many positions llama.cpp may be told of, and why that is less than config.json's, if so."""
    most, window = int(facts["max_position_embeddings"]), facts.get("sliding_window")
    if facts.get("model_type") != "mistral" or not window or window >= most:
        return most, None
    return int(window), (
        f"llama.cpp's llama attends to everything, so that the context is cut to the window of "
        f"{window} tokens (config.json: {most})"
    )


def metadata(facts: Mapping[str, Any]) -> Metadata:
    """Keys of the model's architecture, without those of the file and of the tokenizer.

    facts: as for `problems`, which must have found none.
    """
    family = family_of(facts)
    heads = int(facts["num_attention_heads"])
    size = int(facts.get("head_dim") or facts["hidden_size"] // heads)
    own: Metadata = {
        "vocab_size": int(facts["vocab_size"]),
        "context_length": context(facts)[0],
        "embedding_length": int(facts["hidden_size"]),
        "block_count": int(facts["num_hidden_layers"]),
        "feed_forward_length": int(facts["intermediate_size"]),
        "attention.head_count": heads,
        "attention.head_count_kv": int(facts.get("num_key_value_heads") or heads),
        "attention.key_length": size,
        "attention.value_length": size,
        "attention.layer_norm_rms_epsilon": float(facts["rms_norm_eps"]),
        "rope.dimension_count": size,
    }
    ropes = _ropes(facts)
    rope = ropes.get("full_attention", ropes.get("", {}))
    own["rope.freq_base"] = float(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        own |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if family.architecture == "gemma3":
        own["attention.sliding_window"] = int(facts["sliding_window"])
        own["rope.freq_base_swa"] = float(ropes["sliding_attention"]["rope_theta"])
    return {f"{family.architecture}.{key}": value for key, value in own.items()}


def rope_factors(facts: Mapping[str, Any]) -> list[float] | None:
    """What llama3's scaling divides each of RoPE's frequencies by, `rope_freqs.weight`; None
    without it.

    Frequencies of wavelengths below original / high stay, those above original / low are divided by
    the factor, and between the two the inverse goes linearly with original / wavelength.
    """
    rope = _ropes(facts).get("", {})
    if rope.get("rope_type") != "llama3":
        return None
    heads = int(facts["num_attention_heads"])
    size = int(facts.get("head_dim") or facts["hidden_size"] // heads)
    low, high, factor = (
        float(rope[key]) for key in ("low_freq_factor", "high_freq_factor", "factor")
    )
    original = float(rope["original_max_position_embeddings"])
    out = []
    for pair in range(size // 2):
        wavelength = 2 * math.pi * float(rope["rope_theta"]) ** (2 * pair / size)
        share = min(1.0, max(0.0, (original / wavelength - low) / (high - low)))
        out.append(1 / (share + (1 - share) / factor))
    return out


def _ropes(facts: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Parameters of RoPE by the kind of layer that has them; "" where all have the same."""
    found = facts.get("rope_parameters") or {}
    kinds = {key: value for key, value in found.items() if isinstance(value, dict)}
    return kinds or {"": dict(found)}
