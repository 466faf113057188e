"""Architectures as data: a new decoder is one row of ARCHITECTURES and one tiny config in tests/conftest.py.

Module names are relative to a decoder block (`self_attn.q_proj`) unless a field says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from quantize.errors import ModelError

RopeLayout = Literal["half-split", "interleaved"]
"""Which channels form a rotation pair: (i, i + d/2) or (2i, 2i + 1)."""

Role = Literal["q", "k", "v", "o", "gate", "up", "down"]


@dataclass(frozen=True)
class Edge:
    """A place where a diagonal scale may move without changing the function.

    Output channel c of `source` is divided by λ_c, the matching input columns of every sink are multiplied by it.
    """

    name: str
    source: str
    sinks: tuple[str, ...]
    source_kind: Literal["norm", "linear"]
    kv_group: bool = False
    """Sink column q·d+c reads source channel (q // (H/KV))·d+c: v_proj → o_proj under grouped-query attention."""


@dataclass(frozen=True)
class Architecture:
    """Roles of a decoder's linears, its scale edges and its RoPE layout."""

    model_type: str
    roles: Mapping[str, Role]
    """Linear name → role, for every linear of a block that may be quantized."""
    calibration_order: tuple[tuple[str, ...], ...]
    """Groups of linears that share one input, in the order in which the block computes them."""
    edges: tuple[Edge, ...]
    residual: Mapping[str, str]
    """Linear whose output is added to the residual stream → the norm that reads the stream just before."""
    rope: RopeLayout = "half-split"
    qk_norm: tuple[str, str] | None = None
    """RMSNorms over head_dim that follow q_proj and k_proj."""
    attention: str = "self_attn"
    """The module that projects, rotates and attends."""
    experts: str | None = None
    """Container of routed experts inside a block; None for a dense FFN."""
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"

    def of_role(self, role: Role) -> str:
        """Name of the linear with this role."""
        return next(name for name, found in self.roles.items() if found == role)

    def edge(self, name: str) -> Edge:
        """Return the edge called `name`; ModelError lists the edges there are."""
        for edge in self.edges:
            if edge.name == name:
                return edge
        raise ModelError(
            f"{self.model_type} has no scale edge '{name}'; it has {', '.join(e.name for e in self.edges)}"
        )


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

_PRE_NORM_RESIDUAL = {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"}


def _llama_like(model_type: str, **special: Any) -> Architecture:
    return Architecture(model_type, _GATED_MLP_ROLES, _GATED_MLP_ORDER, _PRE_NORM_EDGES, _PRE_NORM_RESIDUAL, **special)


ARCHITECTURES: Mapping[str, Architecture] = {
    row.model_type: row
    for row in (
        _llama_like("llama"),
        _llama_like("mistral"),
        _llama_like("qwen2"),  # q/k/v biases; a bias is scaled like its row
        _llama_like("qwen3", qk_norm=("self_attn.q_norm", "self_attn.k_norm")),
        _llama_like("helium", rope="interleaved"),
    )
}


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """Return the table row for a parsed config.json; ModelError says which table to extend."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise ModelError(
            f"config.json: model_type {model_type!r} is not supported (supported: {', '.join(ARCHITECTURES)}); "
            "to add it, write one row in ARCHITECTURES of quantize/arch.py (see CONTRIBUTING.md)"
        )
    return ARCHITECTURES[model_type]


@dataclass(frozen=True)
class Shape:
    """Sizes of one model, read from its config.json."""

    n_blocks: int
    hidden: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab: int
    tied: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """Read the sizes; ModelError names the missing or absurd field."""

        def size(key: str, default: int | None = None) -> int:
            value = config.get(key)
            value = default if value is None else value
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= 1 << 31:
                raise ModelError(f"config.json: {key} is {value!r}, expected a positive integer")
            return value

        hidden, n_heads = size("hidden_size"), size("num_attention_heads")
        shape = cls(
            n_blocks=size("num_hidden_layers"),
            hidden=hidden,
            n_heads=n_heads,
            n_kv_heads=size("num_key_value_heads", n_heads),
            head_dim=size("head_dim", hidden // n_heads or 1),
            vocab=size("vocab_size"),
            tied=bool(config.get("tie_word_embeddings", False)),
        )
        if shape.n_heads % shape.n_kv_heads:
            raise ModelError(
                f"config.json: num_attention_heads {shape.n_heads} is no multiple of "
                f"num_key_value_heads {shape.n_kv_heads}"
            )
        return shape
