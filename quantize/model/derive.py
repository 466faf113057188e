"""A decoder block's architecture from what one pass through it shows (`flow`).

Names only tell apart what the flow cannot: which of the linears that share an input makes queries,
which gates. What may move is a candidate here, and proved on the block's weights before its first
use (`prove`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from quantize.model.arch import Architecture, Heads, Role
from quantize.model.edges import (
    Homes,
    edges_of,
    homes_of,
    post_norms_of,
    qk_norm_of,
    residual_of,
    rows_of,
)
from quantize.model.flow import Attending, Flow
from quantize.model.moe import Router
from quantize.model.roles import role_by_name


@dataclass(frozen=True)
class Outer:
    """What stands around the blocks of a model."""

    model_type: str
    blocks: str
    embedding: str
    head: str
    final_norm: str | None
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    final_offset: float = 0.0
    carries: str = ""
    """What goes from layer to layer beside hidden states [B, T, D]; empty: nothing does."""
    shares: bool = False
    """Whether layers read what earlier ones have left for them, such as keys and values."""


def derive(
    block: nn.Module,
    flow: Flow,
    outer: Outer,
    routed: Sequence[str] = (),
    rotary_dim: int | None = None,
    leaves: bool = False,
) -> Architecture:
    """The architecture of one block.

    routed: names within the block of modules whose children `0`, `1`, … are routed experts.
    rotary_dim: leading channels of a head that RoPE rotates; None: not known, all of them.
    leaves: whether later layers read something that it computes beside hidden states.
    """
    modules = dict(block.named_modules())
    linears = _order(flow, modules)
    attending = _attention(flow)
    home = homes_of(modules, routed)
    heads = None if attending is None else _heads(flow, attending, rotary_dim)
    roles = _roles(flow, linears, attending)
    groups = _groups(flow, linears, home)
    edges = edges_of(flow, modules, roles, groups, attending, home)
    residual, writers, stream_norms = residual_of(flow, modules, linears)
    normed = post_norms_of(flow, modules, stream_norms)
    if outer.carries:  # what is added goes to one of several streams, or is not all that goes on
        residual, normed = {}, {}
    residual |= {linear: before for linear, (_, before) in normed.items()}
    qk_norm, qk_offset = qk_norm_of(flow, modules, roles, attending)
    return Architecture(
        model_type=outer.model_type,
        roles=roles,
        calibration_order=groups,
        edges=edges,
        residual=residual,
        post_norms={linear: norm for linear, (norm, _) in normed.items()},
        writers=writers,
        stream_norms=stream_norms,
        qk_norm=qk_norm,
        qk_offset=qk_offset,
        attention=attending.module if attending else _attention_module(linears, roles),
        heads=heads,
        no_cache=_why_no_cache(flow, attending, outer.shares and (leaves or not _has_keys(roles))),
        experts=home.experts,
        blocks=outer.blocks,
        embedding=outer.embedding,
        final_norm=outer.final_norm or "",
        final_offset=outer.final_offset,
        head=outer.head,
        before=outer.before,
        after=outer.after,
        beside=outer.beside,
        carries=outer.carries,
    )


def _order(flow: Flow, modules: Mapping[str, nn.Module]) -> list[str]:
    """Linears in the order of their first call."""
    called = (call.name for call in flow.calls if isinstance(modules[call.name], nn.Linear))
    return [name for name in dict.fromkeys(called) if not isinstance(modules[name], Router)]


def _attention(flow: Flow) -> Attending | None:
    """The call of attention of a block; None where it makes none, or several."""
    return flow.attending[0] if len(flow.attending) == 1 else None


def _heads(flow: Flow, attending: Attending, rotary_dim: int | None) -> Heads:
    rotated = attending.head_dim if rotary_dim is None else rotary_dim
    query, key = (rows_of(flow, n) for n in _before_attention(flow, attending))
    return Heads(attending.n_heads, attending.n_kv_heads, attending.head_dim, rotated, query, key)


def _before_attention(flow: Flow, attending: Attending) -> tuple[int | None, int | None]:
    """Values of queries and keys as linears put them out: the pieces of the module that attends
    that are as long as its heads are wide, in order; values are known."""
    sizes = (
        attending.n_heads * attending.head_dim,
        attending.n_kv_heads * attending.head_dim,
    )
    values = flow.parts.get(attending.value)
    inside = [
        number
        for number, (linear, first, end) in flow.parts.items()
        if linear.rpartition(".")[0] == attending.module
        and (linear, first, end) != values
        and role_by_name(linear) in ("q", "k", "qkv")
    ]
    queries = next((n for n in inside if _is(flow, n, sizes[0], "q")), None)
    others = (n for n in inside if n != queries)
    return queries, next((n for n in others if _is(flow, n, sizes[1], "k")), None)


def _is(flow: Flow, number: int, size: int, role: Role) -> bool:
    """Whether these values are `size` outputs of a linear of that role, or of a fused one."""
    linear, first, end = flow.parts[number]
    return end - first == size and role_by_name(linear) in (role, "qkv")


def _has_keys(roles: Mapping[str, Role]) -> bool:
    return any(role in ("k", "qkv") for role in roles.values())


def _why_no_cache(flow: Flow, attending: Attending | None, shares: bool) -> str:
    """Why the block cannot attend on an INT4 cache; empty where it can."""
    if shares:
        return "it shares keys and values with other layers"
    if not flow.attending:
        return "its attention does not go through transformers' attention interface"
    if attending is None:
        return "it attends more than once"
    if attending.head_dim != attending.value_dim:
        return f"keys have {attending.head_dim} channels and values {attending.value_dim}"
    if attending.n_heads % attending.n_kv_heads:
        return f"{attending.n_heads} heads are no multiple of {attending.n_kv_heads} kv heads"
    if attending.options:
        return f"its attention has {', '.join(sorted(attending.options))}"
    return ""


def _attention_module(linears: Sequence[str], roles: Mapping[str, Role]) -> str:
    return next((n.rpartition(".")[0] for n in linears if roles[n] in ("o", "q", "qkv")), "")


# Roles


def _roles(flow: Flow, linears: Sequence[str], attending: Attending | None) -> dict[str, Role]:
    """Role of every linear: by its name, and by where its output goes."""
    names = set(linears)
    roles: dict[str, Role] = {name: role_by_name(name, names) for name in linears}
    if attending is not None:  # what is seen goes before what it is called
        for call in flow.calls:
            if call.name in roles and call.gives == attending.value:
                alone = attending.value not in (attending.query, attending.key)
                roles[call.name] = "v" if alone else roles[call.name]
    elif any(role in ("q", "k", "v") for role in roles.values()):
        # Without attention that was seen, these are projections of something else.
        roles = {n: "other" if role in ("q", "k", "v") else role for n, role in roles.items()}
    return roles


def _groups(flow: Flow, linears: Sequence[str], home: Homes) -> tuple[tuple[str, ...], ...]:
    """Linears by the values that they read in their first call, and by expert: each sees tokens of
    its own. Experts' groups that read the same stand side by side."""
    groups: dict[tuple[int, str], list[str]] = {}
    first: dict[int, int] = {}
    for index, name in enumerate(linears):
        reads = flow.reads_of(name)
        assert reads is not None
        first.setdefault(reads, index)
        groups.setdefault((reads, home.of(name)), []).append(name)
    order = sorted(
        groups, key=lambda key: first[key[0]]
    )  # stable: of one input, as they were called
    return tuple(tuple(groups[key]) for key in order)
