"""What may move in a decoder block, as candidates: edges of scales, what writes the residual stream,
norms over queries and keys."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from quantize.model.arch import Edge, Experts, Role, Rows
from quantize.model.flow import Attending, Flow


@dataclass(frozen=True)
class Homes:
    """Which experts a block has."""

    experts: Experts | None

    def of(self, name: str) -> str:
        """The expert that a linear lies in; empty outside of all."""
        return "" if self.experts is None else self.experts.home_of(name) or ""

    def label(self, name: str) -> str:
        """What is behind the names of edges within this linear's expert."""
        found = self.of(name)
        if not found:
            return ""
        assert self.experts is not None
        return ".shared" if found == self.experts.shared else f".{found.rpartition('.')[2]}"


def homes_of(modules: Mapping[str, nn.Module], routed: Sequence[str]) -> Homes:
    """The experts of a block. routed: modules whose children `0`, `1`, … are routed ones."""
    if not routed:
        return Homes(None)
    place = routed[0]
    ffn = place.rpartition(".")[0]
    beside = {name.removeprefix(f"{ffn}.") for name in modules if name.startswith(f"{ffn}.")}
    shared = next((n for n in _SHARED if n in beside), "shared_expert")
    gate = next((n for n in ("shared_expert_gate",) if n in beside), "")
    router = next((n for n in ("gate", "router") if n in beside), "")
    prefix = f"{ffn}." if ffn else ""
    return Homes(
        Experts(
            ffn,
            prefix + router if router else "",
            place,
            prefix + shared,
            prefix + gate if gate else "",
        )
    )


_SHARED = ("shared_expert", "shared_experts", "shared_mlp")
"""What an expert is called that every token visits."""


def rows_of(flow: Flow, values: int | None) -> Rows | None:
    """Which outputs of which linear these values are; None where they are none as they stand."""
    part = None if values is None else flow.parts.get(values)
    return None if part is None else Rows(*part)


def edges_of(
    flow: Flow,
    modules: Mapping[str, nn.Module],
    roles: Mapping[str, Role],
    groups: Sequence[tuple[str, ...]],
    attending: Attending | None,
    home: Homes,
) -> tuple[Edge, ...]:
    """All candidates, in the order in which the block computes what they lead to."""
    found = [
        *_norm_edges(flow, modules, roles),
        *_value_edges(flow, roles, attending),
        *_product_edges(flow, roles, home),
    ]
    place = {name: index for index, name in enumerate(modules)}
    order = {name: index for index, group in enumerate(groups) for name in group}
    found.sort(
        key=lambda edge: (min(order.get(s, len(order)) for s in edge.sinks), place[edge.source])
    )
    names: dict[str, int] = {}
    out = []
    for edge in found:
        count = names[edge.name] = names.get(edge.name, 0) + 1
        out.append(edge if count == 1 else replace(edge, name=f"{edge.name}_{count}"))
    return tuple(out)


def _norm_edges(
    flow: Flow,
    modules: Mapping[str, nn.Module],
    roles: Mapping[str, Role],
) -> list[Edge]:
    """Norm → all that read it, where these are products with matrices and nothing else."""
    edges = []
    for call in flow.calls:
        if isinstance(modules[call.name], nn.Linear):
            continue
        sinks = [p.name for p in flow.projections if p.reads == call.gives]
        sinks = list(dict.fromkeys(sinks))
        if not sinks or flow.readers.get(call.gives, set()) - set(sinks):
            continue
        ours = [n for n in sinks if n in roles]
        if not ours:
            continue
        # What recipes quantize first, routers and other readers behind.
        sinks = [*ours, *(n for n in sinks if n not in roles)]
        offset = norm_offset(modules[call.name])
        if offset is not None:
            name = _norm_name(ours, roles)
            edges.append(Edge(name, call.name, tuple(sinks), "norm", offset=offset))
    return edges


def _norm_name(sinks: Sequence[str], roles: Mapping[str, Role]) -> str:
    kinds = {roles[name] for name in sinks}
    if kinds & {"q", "k", "v", "qkv"}:
        return "norm" if kinds & {"gate", "up", "gate_up"} else "attn_norm"
    return "mlp_norm" if kinds & {"gate", "up", "gate_up"} else "inner_norm"


def _value_edges(flow: Flow, roles: Mapping[str, Role], attending: Attending | None) -> list[Edge]:
    """Values → what reads attention's output: diagonals pass through the weighted sum over tokens."""
    if attending is None or attending.head_dim != attending.value_dim:
        return []
    source = rows_of(flow, attending.value)
    # A state-space model beside attention has an output projection of its own (Falcon-H1).
    outputs = [n for n, role in roles.items() if role == "o"]
    outputs.sort(key=lambda name: name.rpartition(".")[0] != attending.module)
    sink = next(iter(outputs), None)
    if source is None or sink is None or source.linear not in roles:
        return []
    edge = Edge("v_o", source.linear, (sink,), "linear", kv_group=True)
    return [_of_rows(edge, source, roles, "v")]


def _of_rows(edge: Edge, source: Rows, roles: Mapping[str, Role], role: Role) -> Edge:
    """The edge from these outputs of its source; from all of them where it makes nothing else."""
    alone = roles[source.linear] == role
    return edge if alone else replace(edge, rows=(source.first, source.end))


def _product_edges(flow: Flow, roles: Mapping[str, Role], home: Homes) -> list[Edge]:
    """Linear → those that read its elementwise product with something else (up → down)."""
    reads: dict[int, list[str]] = {}
    for call in flow.calls:
        if call.name in roles:
            reads.setdefault(call.reads, []).append(call.name)
    edges = []
    for product, factors in flow.products.items():
        sinks = list(dict.fromkeys(reads.get(product, ())))
        readers = flow.readers.get(product, set())
        sources = [
            rows
            for factor in factors
            if (rows := rows_of(flow, factor)) and roles.get(rows.linear) in ("up", "gate_up")
        ]
        if sinks and len(sources) == 1 and readers <= set(sinks):
            name = f"up_down{home.label(sources[0].linear)}"
            edge = Edge(name, sources[0].linear, tuple(sinks), "linear")
            edges.append(_of_rows(edge, sources[0], roles, "up"))
    return edges


def post_norms_of(
    flow: Flow, modules: Mapping[str, nn.Module], stream_norms: Sequence[str]
) -> dict[str, tuple[str, str]]:
    """Linear whose output is added to the stream through a norm alone → (that norm, the one that
    reads the stream before)."""
    linears = {c.gives: c.name for c in flow.calls if isinstance(modules[c.name], nn.Linear)}
    norms = {c.gives: c for c in flow.calls if c.reads in linears}
    reading = {c.reads: c.name for c in flow.calls if c.name in stream_norms}
    return {
        linears[norms[value].reads]: (norms[value].name, reading[stream])
        for value, stream in flow.joined
        if value in norms and stream in reading
    }


def residual_of(
    flow: Flow, modules: Mapping[str, nn.Module], linears: Sequence[str]
) -> tuple[dict[str, str], tuple[str, ...], tuple[str, ...]]:
    """(linear added as it is → norm that reads the stream before, all that write the stream, norms
    that read it)."""
    norms = [
        call
        for call in flow.calls
        if call.reads in flow.streams and not isinstance(modules[call.name], nn.Linear)
    ]
    by_stream: dict[int, list[str]] = {}
    for call in norms:
        by_stream.setdefault(call.reads, []).append(call.name)
    order = {name: index for index, name in enumerate(linears)}
    exact: dict[int, list[str]] = {}
    for name, as_is, stream in flow.added:
        if as_is and name in order:
            exact.setdefault(stream, []).append(name)
    residual = {}
    for stream, names in exact.items():
        # Of several that are added at once (parallel attention) one alone may make up for what is
        # missing, or it would be made up for twice.
        last = max(names, key=lambda name: order[name])
        if stream in by_stream:
            residual[last] = by_stream[stream][-1]
    writers = tuple(n for n in dict.fromkeys(name for name, _, _ in flow.added) if n in order)
    return residual, writers, tuple(dict.fromkeys(call.name for call in norms))


def qk_norm_of(
    flow: Flow,
    modules: Mapping[str, nn.Module],
    roles: Mapping[str, Role],
    attending: Attending | None,
) -> tuple[tuple[str, str] | None, float]:
    """(norms that read queries and keys, what their weights are added to)."""
    if attending is None:
        return None, 0.0
    found: dict[str, str] = {}
    for role in ("q", "k"):
        source = next((n for n, r in roles.items() if r == role), None)
        gives = next((c.gives for c in flow.calls if c.name == source), None)
        for call in flow.calls:
            if call.reads == gives and call.name not in roles:
                found[role] = call.name
    if found.keys() != {"q", "k"}:
        return None, 0.0
    offsets = {norm_offset(modules[name]) for name in found.values()}
    offset = offsets.pop() if len(offsets) == 1 else None
    return (found["q"], found["k"]), offset or 0.0


def norm_offset(norm: nn.Module) -> float | None:
    """o, where a norm multiplies by o + weight: run with weights of zeros, ones and twos.

    None for a module that does something else with its weight, or wants more than its input.
    The norm may be on the meta device, and stays as it is.
    """
    trial = copy.deepcopy(norm)
    size = trial.get_parameter("weight").shape
    x = torch.randn(4, *size, generator=torch.Generator().manual_seed(0))
    for name, parameter in norm.named_parameters():
        trial._parameters[name] = nn.Parameter(torch.zeros(parameter.shape), requires_grad=False)
    out = []
    try:
        for value in (0.0, 1.0, 2.0):
            trial.get_parameter("weight").data.fill_(value)
            with torch.no_grad():
                out.append(trial(x).double())
    except (TypeError, RuntimeError, AttributeError):
        return None
    step = out[1] - out[0]
    if not torch.allclose(out[2] - out[1], step, rtol=1e-3, atol=1e-5) or not bool(step.any()):
        return None
    offset = round(float((out[0] * step).sum() / step.square().sum()), 3)
    return offset if torch.allclose(out[0], offset * step, rtol=1e-3, atol=1e-5) else None
