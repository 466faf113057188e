"""What pq knows of a decoder block: roles of its linears, scale edges, attention, experts.

All of it is derived from the model itself (`derive`) and proved on its weights (`prove`). Module
names are relative to a decoder block (`self_attn.q_proj`) unless a field says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from quantize.errors import ModelError

RopeLayout = Literal["half-split", "interleaved"]
"""Which channels form a rotation pair: (i, i + d/2) or (2i, 2i + 1)."""

Role = Literal["q", "k", "v", "o", "qkv", "gate", "up", "down", "gate_up", "other"]
"""What a linear does; `qkv` and `gate_up` do it for several at once, `other` is of no known kind."""


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
    rows: tuple[int, int] | None = None
    """Outputs [first, end) of a source that makes more than these, as a fused qkv_proj does."""
    offset: float = 0.0
    """A norm multiplies by offset + weight: 1 in Gemma's."""


@dataclass(frozen=True)
class Rows:
    """Outputs [first, end) of a linear: all of q_proj, a third of a fused qkv_proj."""

    linear: str
    first: int
    end: int


@dataclass(frozen=True)
class Heads:
    """Attention of one block."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    rotary_dim: int
    """Leading channels of a head that RoPE rotates; 0: none."""
    query: Rows | None = None
    """What makes queries before any norm over them; None where that is not seen."""
    key: Rows | None = None
    scores: bool = True
    """Whether scaling rotation pairs of queries and keys against each other changes nothing."""


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

    @classmethod
    def of_ffn(cls, ffn: str) -> Experts:
        """The parts of pq's own experts in the place of the FFN of this name."""
        parts = ("gate", "experts", "shared_expert", "shared_expert_gate")
        return cls(ffn, *(f"{ffn}.{part}" for part in parts))

    def home_of(self, name: str) -> str | None:
        """The expert that a module of a block lies in, `mlp.experts.3` or
        `mlp.shared_expert`; None outside of all."""
        if name.startswith(f"{self.shared}."):
            return self.shared
        if name.startswith(f"{self.routed}."):
            return f"{self.routed}.{name.removeprefix(f'{self.routed}.').partition('.')[0]}"
        return None


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
    """Linear whose output is added to the residual stream, as it is or through its norm in
    `post_norms` → the norm that reads the stream just before."""
    writers: tuple[str, ...] = ()
    """Linears whose outputs, perhaps weighed token by token, are summed into the stream."""
    stream_norms: tuple[str, ...] = ()
    """Norms that read the stream."""
    post_norms: Mapping[str, str] = field(default_factory=dict)
    """Linear of `residual` → the norm that its output goes through."""
    rope: RopeLayout = "half-split"
    qk_norm: tuple[str, str] | None = None
    """RMSNorms over head_dim that follow q_proj and k_proj."""
    qk_offset: float = 0.0
    """What their weights are added to."""
    attention: str = "self_attn"
    """The module that projects, rotates and attends; empty where a block has none."""
    heads: Heads | None = None
    """None where attention was not seen at work."""
    no_cache: str = ""
    """Why the block cannot attend on an INT4 cache; empty where it can."""
    experts: Experts | None = None
    """Its Mixture of Experts; None where its FFN is dense."""
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    """Empty where not one norm alone stands between the last block and the head."""
    final_offset: float = 0.0
    """What its weight is added to."""
    head: str = "lm_head"
    before: tuple[str, ...] = ("model.embed_tokens",)
    """Modules with tensors that run before the first block."""
    after: tuple[str, ...] = ("model.norm", "lm_head")
    """Modules with tensors that run behind the last block."""
    beside: tuple[str, ...] = ()
    """Modules, and tensors of the model itself, that text does not pass: towers and projectors."""
    carries: str = ""
    """What goes from layer to layer beside hidden states [B, T, D] (`stream`); empty: nothing."""

    def is_beside(self, name: str) -> bool:
        """Whether a module or tensor, by its full name, is one that text does not pass."""
        return any(name == part or name.startswith(f"{part}.") for part in self.beside)

    def with_others(self, others: Iterable[Architecture]) -> Architecture:
        """What all blocks of a model have together: each is asked for itself where it matters."""
        out = self
        for other in others:
            if other is self:
                continue
            edges = {
                (edge.name, edge.source, edge.sinks): edge for edge in (*out.edges, *other.edges)
            }
            out = replace(
                out,
                roles={**other.roles, **out.roles},
                calibration_order=tuple(
                    dict.fromkeys((*out.calibration_order, *other.calibration_order))
                ),
                edges=tuple(edges.values()),
                residual={**other.residual, **out.residual},
                post_norms={**other.post_norms, **out.post_norms},
                writers=tuple(dict.fromkeys((*out.writers, *other.writers))),
                stream_norms=tuple(dict.fromkeys((*out.stream_norms, *other.stream_norms))),
                qk_norm=out.qk_norm or other.qk_norm,
                attention=out.attention or other.attention,
                heads=out.heads or other.heads,
                experts=out.experts or other.experts,
            )
        return out

    def find_role(self, role: Role) -> str | None:
        """Name of the first linear with this role; None without one."""
        return next((name for name, found in self.roles.items() if found == role), None)

    def of_role(self, role: Role) -> str:
        """As `find_role`; ModelError without one."""
        name = self.find_role(role)
        if name is None:
            raise ModelError(f"{self.model_type}: no linear of the block is its {role} projection")
        return name

    @property
    def run_order(self) -> tuple[tuple[str, ...], ...]:
        """Groups of `calibration_order` as a pass comes to them: an expert with all its linears
        before the next one."""
        place = {name: index for index, name in enumerate(self.roles)}
        return tuple(sorted(self.calibration_order, key=lambda group: place[group[0]]))

    def expert_of(self, name: str) -> str | None:
        """As `Experts.home_of`; None without experts."""
        return None if self.experts is None else self.experts.home_of(name)

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

    def with_experts(self, n: int, model_type: str = "") -> Architecture:
        """The same dense block with n routed experts and a shared one in the place of its gated FFN,
        as LaDiMo's containers name them: `gate_proj`, `up_proj` and `down_proj` in every expert.

        Roles, groups and edges then name linears such as `mlp.experts.3.up_proj`; the norm before
        the FFN also feeds the router and the gate of the shared expert, which are never quantized.
        model_type: the container's; empty: the block's own.
        """
        ffn = self.of_role("down").rpartition(".")[0]
        parts = Experts.of_ffn(ffn)
        homes = {"shared": parts.shared} | {str(e): f"{parts.routed}.{e}" for e in range(n)}

        def inside(names: Iterable[str], home: str) -> tuple[str, ...]:
            found = (_PARTS[self.roles[name]] for name in names)
            return tuple(f"{home}.{part}" for several in found for part in several)

        def in_ffn(name: str) -> bool:
            return name.startswith(f"{ffn}.")

        roles: dict[str, Role] = {
            name: role for name, role in self.roles.items() if not in_ffn(name)
        }
        order = [group for group in self.calibration_order if not in_ffn(group[0])]
        edges = [edge for edge in self.edges if not any(map(in_ffn, edge.sinks))]
        residual = {name: norm for name, norm in self.residual.items() if not in_ffn(name)}
        writers = [name for name in self.writers if not in_ffn(name)]
        for home in homes.values():
            roles |= {f"{home}.{role}_proj": role for role in _EXPERT_ROLES}
            writers += inside(filter(in_ffn, self.writers), home)
        for group in self.calibration_order:
            if in_ffn(group[0]):
                order += [inside(group, home) for home in homes.values()]
        for edge in (edge for edge in self.edges if any(map(in_ffn, edge.sinks))):
            ours = [sink for sink in edge.sinks if in_ffn(sink)]
            sinks = {key: inside(ours, home) for key, home in homes.items()}
            if in_ffn(edge.source):
                edges += [
                    replace(
                        edge,
                        name=f"{edge.name}.{key}",
                        source=f"{home}.up_proj",
                        sinks=sinks[key],
                        rows=None,
                    )
                    for key, home in homes.items()
                ]
            else:
                others = [sink for sink in edge.sinks if sink not in ours]
                everywhere = (sink for group in sinks.values() for sink in group)
                new = (*everywhere, *others, parts.router, parts.shared_gate)
                edges.append(replace(edge, sinks=new))
        return replace(
            self,
            model_type=model_type or self.model_type,
            roles=roles,
            calibration_order=tuple(order),
            edges=tuple(edges),
            residual=residual,
            post_norms={name: norm for name, norm in self.post_norms.items() if name in residual},
            writers=tuple(writers),
            experts=parts,
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


_EXPERT_ROLES: tuple[Role, ...] = ("gate", "up", "down")
_PARTS: Mapping[Role, tuple[str, ...]] = {
    "gate": ("gate_proj",),
    "up": ("up_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
"""Role of a linear of a dense FFN → what does it in an expert."""


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
            # Latent attention of some types (GLM-5) has a head_dim of 0: of its own sizes none.
            absent = value is None or (default is not None and value == 0)
            value = default if absent else value
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


CONTAINER = "qwen2_moe"
"""The type of model that LaDiMo turns a dense one into, and whose experts pq computes itself."""

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


def parameters_of_a_token(
    arch: Architecture, shape: Shape, sizes: Mapping[str, tuple[int, ...]]
) -> int:
    """Parameters that a token of text would be multiplied with if it visited all experts:
    all but the embedding table's.

    sizes: full name → shape of every tensor, none packed; a head that shares
    the embedding's weight counts.
    """
    tied = shape.vocab * shape.hidden if shape.tied else 0
    return tied + sum(
        math.prod(size)
        for name, size in sizes.items()
        if not name.startswith(f"{arch.embedding}.") and not arch.is_beside(name)
    )
