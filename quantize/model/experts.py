"""Routed experts of a transformers model as one linear per expert and role.

transformers keeps the experts of a layer in stacked 3-D parameters, which no linear of pq's could
stand in for. `split_experts` puts `Experts` in their place: the same call, the same function, with
linears named `3.gate_proj`, `3.up_proj` and `3.down_proj`. How a stack is laid out is read off the
module and then proven on a small random instance, so that an unknown layout is an error.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from quantize.errors import ModelError

__all__ = [
    "KEPT_WHOLE",
    "Experts",
    "Layout",
    "expert_layouts",
    "kept_whole",
    "proves",
    "split_experts",
]


@dataclass(frozen=True)
class Layout:
    """How stacked parameters hold the experts of a layer."""

    gated: bool
    """Whether gate and up projection share one stack."""
    interleaved: bool
    """Whether rows of gate and up alternate, rather than gate before up."""
    transposed: bool
    """Whether a matrix is [inputs, outputs]."""
    bias: bool
    per_expert: bool
    """Whether the call gives every expert its own equal part of the tokens, without routing."""

    @classmethod
    def of(cls, module: nn.Module) -> Layout:
        """Read it off a module of stacked experts."""
        stacks = module._parameters
        gated = "gate_up_proj" in stacks
        first, down = stacks["gate_up_proj" if gated else "up_proj"], stacks["down_proj"]
        assert first is not None
        assert down is not None
        by_shape = gated and first.shape[2] == 2 * down.shape[1]
        return cls(
            gated,
            not getattr(module, "is_concatenated", True),
            bool(getattr(module, "is_transposed", by_shape)),
            "down_proj_bias" in stacks,
            len(inspect.signature(module.forward).parameters) == 1,
        )

    def parts(self, name: str, stack: Any, expert: int) -> dict[str, Tensor]:
        """The tensors of one expert in a stack, read from a tensor or a slice of a safetensors
        file → {`gate_proj.weight`: [I, D], …}, biases likewise."""
        one = stack[expert]
        bias = name.endswith("_bias")
        role, kind = (name.removesuffix("_bias"), "bias") if bias else (name, "weight")
        if self.transposed and not bias:
            one = one.T
        if role != "gate_up_proj":
            return {f"{role}.{kind}": one}
        gate, up = (one[::2], one[1::2]) if self.interleaved else one.chunk(2)
        return {f"gate_proj.{kind}": gate, f"up_proj.{kind}": up}

    def stacked(self, name: str, parts: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """Undo `parts`: a stack, from what every expert has in it."""
        bias = name.endswith("_bias")
        role, kind = (name.removesuffix("_bias"), "bias") if bias else (name, "weight")
        rows = []
        for expert in parts:
            if role != "gate_up_proj":
                one = expert[f"{role}.{kind}"]
            else:
                both = (expert[f"gate_proj.{kind}"], expert[f"up_proj.{kind}"])
                one = torch.stack(both, 1).flatten(0, 1) if self.interleaved else torch.cat(both)
            rows.append(one.T if self.transposed and not bias else one)
        return torch.stack(rows)


class Experts(nn.Module):
    """Stands in for a module of stacked experts; child `3` holds the linears of expert 3."""

    every_token = False
    """Recording: every expert gets the very tensor of all tokens; nothing depends on data."""

    def __init__(self, original: nn.Module, layout: Layout) -> None:
        super().__init__()
        # The activation is the original's own; a tuple keeps it out of the tree of modules.
        shell = copy.copy(original)
        shell._parameters = {}
        self._original = (shell,)
        self.layout = layout
        count = original._parameters["down_proj"].shape[0]  # type: ignore[union-attr]
        for expert in range(count):
            tensors: dict[str, Tensor] = {}
            for name, stack in original._parameters.items():
                tensors |= layout.parts(name, stack, expert)
            self.add_module(str(expert), _linears(tensors))

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
    ) -> Tensor:
        """hidden_states [M, D], indices and weights [M, k] → [M, D]."""
        if self.layout.per_expert:
            parts = hidden_states.view(len(self._modules), -1, hidden_states.shape[-1])
            if self.every_token:
                every = [self._one(e, hidden_states) for e in range(len(parts))]
                rows = parts.shape[1]
                return torch.cat([y[e * rows : (e + 1) * rows] for e, y in enumerate(every)])
            return torch.cat([self._one(e, part) for e, part in enumerate(parts)])
        assert top_k_index is not None
        assert top_k_weights is not None
        total = torch.zeros_like(hidden_states)
        for expert in range(len(self._modules)):
            chosen = top_k_index == expert
            if self.every_token:
                weight = (top_k_weights * chosen).sum(-1, keepdim=True)
                total = total + (self._one(expert, hidden_states) * weight).to(total.dtype)
                continue
            token, place = torch.where(chosen)
            # Run without any token as well: whoever records an expert's inputs sees that there are none.
            y = self._one(expert, hidden_states[token]) * top_k_weights[token, place, None]
            total.index_add_(0, token, y.to(total.dtype))
        return total

    def _one(self, expert: int, x: Tensor) -> Tensor:
        linears: Any = self._modules[str(expert)]
        up = linears.up_proj(x)
        gated = self.layout.gated
        act: Any = self._original[0].act_fn if not gated else None
        inner = self._gate(linears.gate_proj(x), up) if gated else act(up)
        y: Tensor = linears.down_proj(inner)
        return y

    def _gate(self, gate: Tensor, up: Tensor) -> Tensor:
        """Gate and up projection [M, I] → input of the down projection, by the original's rule."""
        original: Any = self._original[0]
        if not hasattr(original, "_apply_gate"):
            plain: Tensor = original.act_fn(gate) * up
            return plain
        both = torch.cat((gate, up), -1)
        if self.layout.interleaved:
            both = torch.stack((gate, up), -1).flatten(-2)
        gated: Tensor = original._apply_gate(both)
        return gated


def _linears(tensors: dict[str, Tensor]) -> nn.Module:
    holder = nn.Module()
    for role in ("gate_proj", "up_proj", "down_proj"):
        weight, bias = tensors.get(f"{role}.weight"), tensors.get(f"{role}.bias")
        if weight is None:
            continue
        linear = nn.Linear.__new__(nn.Linear)  # whose weights would be drawn, at ten times the cost
        nn.Module.__init__(linear)
        linear.out_features, linear.in_features = weight.shape
        for part, tensor in (("weight", weight), ("bias", bias)):
            own = None if tensor is None else nn.Parameter(tensor.detach().contiguous(), False)
            linear.register_parameter(part, own)
        holder.add_module(role, linear)
    return holder


def proves(original: nn.Module, layout: Layout) -> bool:
    """Whether experts split by `layout` compute what `original` does, and gate is gate and up is up:
    float64, random weights and routing, on a copy of the module with small matrices (D = 6, I = 4)
    and few experts.
    """
    hidden, size, most = 6, 4, 5
    small: Any = copy.copy(original)
    small._parameters = {}
    if hasattr(small, "config"):
        small.config = copy.copy(small.config)
        small.config._experts_implementation = "eager"
    count = min(most, len(original._parameters["down_proj"]))  # type: ignore[arg-type]
    for name, value in (("hidden_size", hidden), ("num_experts", count)):
        if hasattr(small, name):
            setattr(small, name, value)
    draw = torch.Generator().manual_seed(0)
    for name, stack in original._parameters.items():
        assert stack is not None
        into, out = (size, hidden) if name.startswith("down") else (hidden, size)
        out *= 2 if name.startswith("gate_up") else 1
        shape = (out,) if name.endswith("_bias") else (out, into)
        shape = shape[::-1] if layout.transposed else shape
        small._parameters[name] = nn.Parameter(
            torch.randn(count, *shape, generator=draw, dtype=torch.float64), False
        )
    tokens = torch.randn(2 * count, hidden, generator=draw, dtype=torch.float64)
    index = torch.rand(2 * count, count, generator=draw).topk(min(2, count)).indices
    weights = torch.rand(index.shape, generator=draw, dtype=torch.float64)
    given = (tokens,) if layout.per_expert else (tokens, index, weights)
    with torch.no_grad(), torch.device("cpu"):
        wanted = type(original).forward(small, *given)
        experts = Experts(small, layout)
        got = experts(*given)
        # Some activations compute in float32 whatever they are given; another layout is off by as
        # much as the outputs are large.
        same = torch.allclose(wanted, got, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
        return bool(same and (not layout.gated or _roles_hold(experts, draw)))


def _roles_hold(experts: Experts, draw: torch.Generator) -> bool:
    """Whether unit j of the gated product depends on gate j and up j alone, and affinely on up:
    the output of experts is right even where rows of the two are mixed up."""
    # Small enough to stay clear of any clamp.
    gate, up, other = 0.1 * torch.randn(3, 1, 8, generator=draw, dtype=torch.float64)
    y, z = experts._gate(gate, up), experts._gate(gate, other)
    middle = experts._gate(gate, (up + other) / 2)
    moved = experts._gate(gate, torch.cat((other[:, :1], up[:, 1:]), -1))
    mixed = torch.cat((z[:, :1], y[:, 1:]), -1)
    size = float(y.abs().max())
    affine = torch.allclose(middle, (y + z) / 2, rtol=0, atol=_AFFINE * size)
    return affine and torch.allclose(moved, mixed, rtol=1e-5, atol=1e-6 * size)


_AFFINE = 5e-4
"""Of the largest output: a softcap of 5 on up is affine to 1e-4 there, an activation of the gate to a
hundredth."""


def expert_layouts(model: nn.Module) -> dict[str, Layout]:
    """How every module of stacked experts holds them, by name, each layout proven once a class.

    The model may be on the meta device. ModelError names a module that cannot be split.
    """
    proven: set[tuple[type, Layout]] = set()
    layouts: dict[str, Layout] = {}
    for name, module in model.named_modules():
        if not any(p is not None and p.ndim == 3 for p in module._parameters.values()):
            continue
        if not type(module).__name__.endswith("Experts"):
            continue
        if all((type(module).__name__, key) in KEPT_WHOLE for key in module._parameters):
            continue
        names = set(module._parameters)
        first = "gate_up_proj" if "gate_up_proj" in names else "up_proj"
        known = {first, "down_proj"}
        if names not in (known, known | {f"{n}_bias" for n in known}):
            raise _unsplittable(name, module)
        counts = {len(stack) for stack in module._parameters.values() if stack is not None}
        if counts != {getattr(module, "num_experts", max(counts))}:
            # Such as experts without weights, which a router may choose all the same.
            raise _unsplittable(name, module)
        layout = Layout.of(module)
        if (type(module), layout) not in proven:
            try:
                good = not getattr(module, "has_post_expert_norm", False) and proves(module, layout)
            except (RuntimeError, AttributeError, TypeError, IndexError, ValueError) as error:
                raise _unsplittable(name, module) from error
            if not good:
                raise _unsplittable(name, module)
            proven.add((type(module), layout))
        layouts[name] = layout
    return layouts


def split_experts(model: nn.Module, layouts: Mapping[str, Layout] | None = None) -> tuple[str, ...]:
    """Replace every module of stacked experts by `Experts` → names of the modules replaced.

    layouts: `expert_layouts` of the model, where they are known already.
    """
    layouts = expert_layouts(model) if layouts is None else layouts
    for name, layout in layouts.items():
        model.set_submodule(name, Experts(model.get_submodule(name), layout))
    return tuple(layouts)


_SHARED = "shared experts in one stack, each weighed by itself"
KEPT_WHOLE: Mapping[tuple[str, str], str] = {
    ("ZambaMambaMixer", "x_proj_weight"): "projections of a state-space scan, by group of heads",
    ("ZambaMambaMixer", "dt_proj_weight"): "projections of a state-space scan, by group of heads",
    ("ZambaMambaMixer", "A_log"): "decay rates of a state-space scan",
    ("InklingSharedExperts", "gate_proj"): _SHARED,
    ("InklingSharedExperts", "up_proj"): _SHARED,
    ("InklingSharedExperts", "down_proj"): _SHARED,
    ("RecurrentGemmaRglru", "input_gate_weight"): "block-diagonal gates of a recurrence",
    ("RecurrentGemmaRglru", "recurrent_gate_weight"): "block-diagonal gates of a recurrence",
}
"""Class and parameter → why it stays as it is, though it holds several matrices."""


def whole_stacks(model: nn.Module) -> dict[str, str]:
    """Parameters below that are of KEPT_WHOLE, by name → why."""
    found = {}
    for name, module in model.named_modules():
        for key in module._parameters:
            if reason := KEPT_WHOLE.get((type(module).__name__, key)):
                found[f"{name}.{key}"] = reason
    return found


def kept_whole(model: nn.Module) -> dict[str, str]:
    """Parameters of several matrices that are none of a linear, by name → why they stay.

    model: with its experts split; its text decoder, where it has other parts. ModelError for one
    that is neither a convolution's nor in KEPT_WHOLE: its matrices would go unseen.
    """
    kept = {}
    for name, parameter in model.named_parameters():
        owner, _, last = name.rpartition(".")
        module = model.get_submodule(owner)
        if sum(size > 1 for size in parameter.shape) < 3 or isinstance(module, _ConvNd):
            continue
        reason = KEPT_WHOLE.get((type(module).__name__, last))
        if reason is None:
            raise ModelError(
                f"{name} ({type(module).__name__}) holds {list(parameter.shape)}, matrices that pq "
                "cannot split into linears; convert a model of another type"
            )
        kept[name] = reason
    return kept


def _unsplittable(name: str, module: nn.Module) -> ModelError:
    return ModelError(
        f"{name} ({type(module).__name__}) holds experts in a form that pq cannot split into "
        "linears; convert a model of another type"
    )
