"""What small models are known to be, written by hand: what pq derives is held against it.

Types that nobody describes here are covered by what the derived architecture does to the model's
function (tests/model/test_derive.py, tests/models).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quantize.model.arch import Architecture, Edge, Experts, ExpertSizes, Heads, Role, Rows

_GATED_MLP_ROLES: Mapping[str, Role] = {
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "o",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}
_GATED_MLP_ORDER = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
_PRE_NORM_EDGES = (
    Edge("attn_norm", "input_layernorm", _GATED_MLP_ORDER[0], "norm"),
    Edge("v_o", "self_attn.v_proj", _GATED_MLP_ORDER[1], "linear", kv_group=True),
    Edge("mlp_norm", "post_attention_layernorm", _GATED_MLP_ORDER[2], "norm"),
    Edge("up_down", "mlp.up_proj", _GATED_MLP_ORDER[3], "linear"),
)

_PRE_NORM_RESIDUAL = {
    "self_attn.o_proj": "input_layernorm",
    "mlp.down_proj": "post_attention_layernorm",
}


def _heads(n: int) -> Heads:
    query, key = Rows("self_attn.q_proj", 0, 64 * n), Rows("self_attn.k_proj", 0, 128)
    return Heads(n, 2, 64, 64, query, key)


def _llama_like(model_type: str, **special: Any) -> Architecture:
    return Architecture(
        model_type,
        _GATED_MLP_ROLES,
        _GATED_MLP_ORDER,
        _PRE_NORM_EDGES,
        _PRE_NORM_RESIDUAL,
        writers=tuple(_PRE_NORM_RESIDUAL),
        stream_norms=("input_layernorm", "post_attention_layernorm"),
        heads=_heads(special.pop("heads", 4)),
        **special,
    )


ARCHITECTURES: Mapping[str, Architecture] = {
    row.model_type: row
    for row in (
        _llama_like("llama"),
        _llama_like("mistral"),
        _llama_like("qwen2"),  # q/k/v biases; a bias is scaled like its row
        _llama_like("qwen3", qk_norm=("self_attn.q_norm", "self_attn.k_norm")),
        _llama_like("helium", heads=2, rope="interleaved"),
        _llama_like("ministral"),
        _llama_like("ministral3"),  # queries are scaled by position behind RoPE
        _llama_like("seed_oss"),
        _llama_like("smollm3"),  # some layers do not rotate, so pairs are free there
        _llama_like("ernie4_5", rope="interleaved"),
        _llama_like("qwen2_moe", experts=Experts()),
    )
}


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The row of a config.json."""
    return ARCHITECTURES[config["model_type"]]


def block_architecture(arch: Architecture, config: Mapping[str, Any], index: int) -> Architecture:
    """The row of block `index` alone, with its experts written out where it has any."""
    if arch.experts is None:
        return arch
    sizes = ExpertSizes.of(config)
    dense = index in sizes.dense_blocks
    return replace(arch, experts=None) if dense else arch.with_experts(sizes.n)
