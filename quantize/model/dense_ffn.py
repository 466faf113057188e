"""A dense gated FFN of a transformers model, whatever its parts are called, and a Mixture of Experts
in its place.

y = (act(x W_gᵀ) ⊙ x W_uᵀ) W_dᵀ. Gate and up projection may be rows of one linear. The activation is
the FFN's own module, so that GeGLU and others need no name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from quantize.errors import ModelError
from quantize.formats.routing import Policy
from quantize.model.arch import Architecture, ExpertSizes
from quantize.model.moe import MoeFfn
from quantize.model.roles import role_by_name

_GATED = ({"gate", "up", "down"}, {"gate_up", "down"})
"""Roles of the linears of a gated FFN."""
_FFN_ROLES = set[str]().union(*_GATED)
_MOST = 3


def dense_ffn_of(arch: Architecture) -> str:
    """Name of the dense gated FFN of a block; ModelError says what there is instead."""
    if arch.experts is not None:
        raise ModelError(f"a {arch.model_type} model has experts already ({arch.experts.routed})")
    place = arch.of_role("down").rpartition(".")[0]
    linears = {name: role for name, role in arch.roles.items() if role in _FFN_ROLES}
    outside = [name for name in linears if name.rpartition(".")[0] != place]
    if not place or outside or set(linears.values()) not in _GATED or len(linears) > _MOST:
        raise ModelError(
            f"a {arch.model_type} model has no dense gated FFN by itself: the linears of its FFN are "
            f"{', '.join(linears)}"
        )
    return place


@dataclass(frozen=True)
class DenseParts:
    """Parts of a dense gated FFN."""

    gate: str
    """Name of the linear within the FFN."""
    up: str
    """Equal to `gate` where one linear does both, F rows each."""
    down: str
    act: nn.Module
    hidden: int
    """Inputs and outputs D."""
    neurons: int
    """Hidden neurons F."""
    biased: tuple[str, ...] = ()
    """Names of the linears that have a bias, which no expert has."""

    @classmethod
    def of(cls, name: str, ffn: nn.Module) -> DenseParts:
        """Find them; ModelError names what is not as in other FFNs. name: for messages."""
        linears = {n: m for n, m in ffn.named_modules() if isinstance(m, nn.Linear)}
        roles = {role_by_name(n, linears): n for n in linears}
        acts = [
            m for m in ffn.children() if not isinstance(m, nn.Linear | nn.Dropout | nn.Identity)
        ]
        if set(roles) not in _GATED or len(acts) != 1 or [*acts[0].parameters()]:
            raise ModelError(f"{name}: {type(ffn).__name__} is no dense gated FFN that pq knows")
        down = linears[roles["down"]]
        gate, up = (roles.get(role) or roles["gate_up"] for role in ("gate", "up"))
        biased = tuple(n for n, linear in linears.items() if linear.bias is not None)
        return cls(gate, up, roles["down"], acts[0], down.out_features, down.in_features, biased)

    @property
    def is_fused(self) -> bool:
        """Whether one linear is gate and up projection."""
        return self.gate == self.up


def require_unbiased(name: str, parts: DenseParts) -> None:
    """ModelError for biases. name: the FFN's, for messages."""
    if parts.biased:
        raise ModelError(f"{name}.{parts.biased[0]} has a bias, which experts have no place for")


def empty_experts(
    name: str, ffn: nn.Module, sizes: ExpertSizes, policy: Policy | None = None
) -> MoeFfn:
    """Experts without values in the place of a dense FFN, in its dtype, on the meta device.

    name: for messages. ModelError for an FFN of another kind.
    """
    parts = DenseParts.of(name, ffn)
    require_unbiased(name, parts)
    if sizes.n * sizes.size + sizes.shared != parts.neurons:
        raise ModelError(
            f"{name}: {sizes.n} experts of {sizes.size} and a shared one of {sizes.shared} are not "
            f"the {parts.neurons} neurons of its FFN"
        )
    with torch.device("meta"):
        made = MoeFfn(parts.hidden, sizes, parts.act, policy)
    dtype = ffn.get_submodule(parts.down).get_parameter("weight").dtype
    return made.to(dtype).eval().requires_grad_(False)


def place_native_experts(
    model: nn.Module, sizes: Mapping[str, int], routing: Mapping[str, Policy]
) -> None:
    """Put experts in the places of the dense FFNs that `routing` names, as pq's own format has them.

    sizes: the numbers `n`, `size` and `shared`. routing: name of an FFN in `model` → how it routes.
    ModelError for names and sizes that do not fit the model.
    """
    found = ExpertSizes(
        sizes["n"], sizes["size"], sizes["shared"], 1, False, dense_blocks=frozenset()
    )
    for name, policy in routing.items():
        try:
            dense = model.get_submodule(name)
        except AttributeError:
            raise ModelError(f"config.json: routing names {name}, which is no FFN") from None
        model.set_submodule(name, empty_experts(name, dense, found, policy))
