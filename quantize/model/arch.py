"""Architectures as data: a new decoder is one row of ARCHITECTURES and one tiny
config in tests/conftest.py.

Module names are relative to a decoder block (`self_attn.q_proj`) unless a field says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from quantize.errors import ModelError

RopeLayout = Literal["half-split", "interleaved"]
"""Which channels form a rotation pair: (i, i + d/2) or (2i, 2i + 1)."""

Role = Literal["q", "k", "v", "o", "gate", "up", "down"]


@dataclass(frozen=True)
class Edge:
    """A place where a diagonal scale may move without changing the function.

    Output channel c of `source` is divided by λ_c, the matching input columns of
    every sink are multiplied by it.
    """

    name: str
    source: str
    sinks: tuple[str, ...]
    source_kind: Literal["norm", "linear"]
    kv_group: bool = False
    """Sink column q·d+c reads source channel (q // (H/KV))·d+c: v_proj → o_proj
    under grouped-query attention."""


@dataclass(frozen=True)
class Experts:
    """Names of the parts of a Mixture of Experts that stands where a dense FFN would."""

    ffn: str = "mlp"
    router: str = "mlp.gate"
    """Linear without bias whose outputs are the scores of the routed experts."""
    routed: str = "mlp.experts"
    shared: str = "mlp.shared_expert"
    """Expert that every token visits."""
    shared_gate: str = "mlp.shared_expert_gate"
    """Linear of one output without bias; the shared expert's output is
    multiplied by its sigmoid."""


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
    """Linear whose output is added to the residual stream → the norm that
    reads the stream just before."""
    rope: RopeLayout = "half-split"
    qk_norm: tuple[str, str] | None = None
    """RMSNorms over head_dim that follow q_proj and k_proj."""
    attention: str = "self_attn"
    """The module that projects, rotates and attends."""
    experts: Experts | None = None
    """Its Mixture of Experts; None where every FFN is dense. Of a model, not of each
    block: see `with_experts`."""
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"

    def of_role(self, role: Role) -> str:
        """Name of the linear with this role."""
        return next(name for name, found in self.roles.items() if found == role)

    def expert_of(self, name: str) -> str | None:
        """The expert that a module of a block lies in, `mlp.experts.3` or
        `mlp.shared_expert`; None outside of all."""
        parts = self.experts
        if parts is not None and name.startswith(f"{parts.shared}."):
            return parts.shared
        if parts is not None and name.startswith(f"{parts.routed}."):
            return f"{parts.routed}.{name.removeprefix(f'{parts.routed}.').partition('.')[0]}"
        return None

    def is_routed(self, name: str) -> bool:
        """Whether a module of a block lies in an expert that sees only the tokens routed to it."""
        return self.experts is not None and name.startswith(f"{self.experts.routed}.")

    def dense_name(self, name: str) -> str:
        """The name that a linear of an expert has in a dense FFN; other names are their own."""
        expert = self.expert_of(name)
        return (
            name
            if self.experts is None or expert is None
            else self.experts.ffn + name.removeprefix(expert)
        )

    def with_experts(self, n: int) -> Architecture:
        """The same decoder for a block whose FFN has n routed experts: the FFN's
        linears stand once in every expert.

        Roles, groups and edges then name linears such as `mlp.experts.3.up_proj`; the norm before
        the FFN also feeds the router and the gate of the shared expert, which are never quantized.
        """
        parts = self.experts
        assert parts is not None, self.model_type
        homes = {"shared": parts.shared} | {str(e): f"{parts.routed}.{e}" for e in range(n)}

        def inside(name: str, home: str) -> str:
            return home + name.removeprefix(parts.ffn)

        def in_ffn(name: str) -> bool:
            return name.startswith(f"{parts.ffn}.")

        roles: dict[str, Role] = {
            name: role for name, role in self.roles.items() if not in_ffn(name)
        }
        order = [group for group in self.calibration_order if not in_ffn(group[0])]
        edges = [edge for edge in self.edges if not any(map(in_ffn, edge.sinks))]
        residual = {name: norm for name, norm in self.residual.items() if not in_ffn(name)}
        for home in homes.values():
            roles |= {inside(name, home): role for name, role in self.roles.items() if in_ffn(name)}
            residual |= {
                inside(name, home): norm for name, norm in self.residual.items() if in_ffn(name)
            }
        for group in self.calibration_order:
            if in_ffn(group[0]):
                order += [tuple(inside(name, home) for name in group) for home in homes.values()]
        for edge in (edge for edge in self.edges if any(map(in_ffn, edge.sinks))):
            sinks = {
                key: tuple(inside(sink, home) for sink in edge.sinks) for key, home in homes.items()
            }
            if in_ffn(edge.source):
                edges += [
                    replace(
                        edge,
                        name=f"{edge.name}.{key}",
                        source=inside(edge.source, home),
                        sinks=sinks[key],
                    )
                    for key, home in homes.items()
                ]
            else:
                everywhere = tuple(sink for group in sinks.values() for sink in group)
                edges.append(replace(edge, sinks=(*everywhere, parts.router, parts.shared_gate)))
        return replace(
            self, roles=roles, calibration_order=tuple(order), edges=tuple(edges), residual=residual
        )

    def edge(self, name: str) -> Edge:
        """Return the edge called `name`; ModelError lists the edges there are."""
        for edge in self.edges:
            if edge.name == name:
                return edge
        raise ModelError(
            f"{self.model_type} has no scale edge '{name}'; it has "
            f"{', '.join(e.name for e in self.edges)}"
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

_PRE_NORM_RESIDUAL = {
    "self_attn.o_proj": "input_layernorm",
    "mlp.down_proj": "post_attention_layernorm",
}


def _llama_like(model_type: str, **special: Any) -> Architecture:
    return Architecture(
        model_type,
        _GATED_MLP_ROLES,
        _GATED_MLP_ORDER,
        _PRE_NORM_EDGES,
        _PRE_NORM_RESIDUAL,
        **special,
    )


ARCHITECTURES: Mapping[str, Architecture] = {
    row.model_type: row
    for row in (
        _llama_like("llama"),
        _llama_like("mistral"),
        _llama_like("qwen2"),  # q/k/v biases; a bias is scaled like its row
        _llama_like("qwen3", qk_norm=("self_attn.q_norm", "self_attn.k_norm")),
        _llama_like("helium", rope="interleaved"),
        _llama_like("ministral"),
        _llama_like("ministral3"),  # queries are scaled by position behind RoPE
        _llama_like("seed_oss"),
        _llama_like("smollm3"),  # some layers do not rotate, so pairs are free there
        _llama_like("ernie4_5", rope="interleaved"),
        _llama_like("qwen2_moe", experts=Experts()),
    )
}


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """Return the table row for a parsed config.json; ModelError says which table to extend."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise ModelError(
            f"config.json: model_type {model_type!r} is not supported (supported: "
            f"{', '.join(ARCHITECTURES)}); to add it, write one row in ARCHITECTURES of "
            "quantize/model/arch.py (see CONTRIBUTING.md)"
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


ROUTERS = ("gate", "shared_expert_gate")
"""Linears of an FFN with experts, by their names within it, that no recipe quantizes."""


@dataclass(frozen=True)
class ExpertSizes:
    """Sizes of the Mixture of Experts of a `qwen2_moe` config.json; the same in
    every block that has one."""

    n: int
    """Routed experts."""
    size: int
    """Hidden neurons of a routed expert."""
    shared: int
    """Hidden neurons of the shared expert."""
    top_k: int
    renormalize: bool
    """Whether the weights of the chosen experts are scaled to add up to 1."""
    dense_blocks: frozenset[int]
    """Blocks whose FFN is dense."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> ExpertSizes:
        """Read the sizes; ModelError names the missing or absurd field."""

        def size(key: str) -> int:
            value = config.get(key)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= 1 << 20:
                raise ModelError(f"config.json: {key} is {value!r}, expected a positive integer")
            return value

        dense, step = config.get("mlp_only_layers") or [], config.get("decoder_sparse_step", 1)
        if not isinstance(dense, list) or not all(isinstance(index, int) for index in dense):
            raise ModelError(
                f"config.json: mlp_only_layers is {dense!r}, expected a list of block numbers"
            )
        if not isinstance(step, int) or step < 1:
            raise ModelError(
                f"config.json: decoder_sparse_step is {step!r}, expected a positive integer"
            )
        blocks = size("num_hidden_layers")
        found = cls(
            n=size("num_experts"),
            size=size("moe_intermediate_size"),
            shared=size("shared_expert_intermediate_size"),
            top_k=size("num_experts_per_tok"),
            renormalize=bool(config.get("norm_topk_prob", False)),
            dense_blocks=frozenset(dense)
            | {index for index in range(blocks) if (index + 1) % step},
        )
        if found.top_k > found.n:
            raise ModelError(
                f"config.json: num_experts_per_tok {found.top_k} is above num_experts {found.n}"
            )
        return found


def block_architecture(arch: Architecture, config: Mapping[str, Any], index: int) -> Architecture:
    """The row of block `index` alone, with its experts written out where it has any."""
    if arch.experts is None:
        return arch
    sizes = ExpertSizes.of(config)
    return arch if index in sizes.dense_blocks else arch.with_experts(sizes.n)


def parameters_of_a_token(
    arch: Architecture, shape: Shape, sizes: Mapping[str, tuple[int, ...]]
) -> int:
    """Parameters that a token would be multiplied with if it visited all experts:
    all but the embedding table's.

    sizes: full name → shape of every tensor, none packed; a head that shares
    the embedding's weight counts.
    """
    tied = shape.vocab * shape.hidden if shape.tied else 0
    return tied + sum(
        math.prod(size) for name, size in sizes.items() if not name.startswith(f"{arch.embedding}.")
    )
