"""A Mixture of Experts as pq computes it: one linear an expert and role,
named as checkpoints name them.

transformers keeps the experts of a block in two stacked tensors, which no linear of
pq's could stand in for; the
function is the same: y = Σ_e w_e(x)·E_e(x) + σ(g·x)·S(x), with w the softmax of the router's scores
where the policy selects expert e, else 0.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantize.errors import ModelError
from quantize.formats.routing import Policy, Threshold, TopK, policy_from_json
from quantize.kernels.experts.api import routed_experts
from quantize.model.arch import CONTAINER, Experts, ExpertSizes
from quantize.model.hooks import is_hooked
from quantize.model.transformers_api import activation, is_silu

__all__ = [
    "Expert",
    "MoeFfn",
    "Policy",
    "Router",
    "Threshold",
    "TopK",
    "place_experts",
    "policy_from_json",
    "set_routers_apart",
]


class Router(nn.Linear):
    """A linear that decides how much of an expert a token gets; never quantized,
    and no linear to recipes."""


def set_routers_apart(model: nn.Module, routes: Callable[[str, int], bool]) -> None:
    """Make routers of a model's linears that route, by full name and the smaller of its sizes,
    and of those whose class computes something else than x Wᵀ + b (Llama 4's router)."""
    linear: dict[type, bool] = {nn.Linear: True, Router: True}
    apart: dict[type, type] = {nn.Linear: Router}
    for name, module in model.named_modules():
        kind = type(module)
        if not isinstance(module, nn.Linear) or isinstance(module, Router):
            continue
        if kind not in linear:
            linear[kind] = _computes_linear(module)
        if not linear[kind] or routes(name, min(module.out_features, module.in_features)):
            if kind not in apart:
                apart[kind] = type(kind.__name__, (kind, Router), {})
            module.__class__ = apart[kind]


def _computes_linear(module: nn.Linear) -> bool:
    """Whether a module of the same class and three outputs of five inputs is x Wᵀ + b."""
    draw = torch.Generator().manual_seed(0)
    trial = copy.copy(module)
    trial.in_features, trial.out_features = 5, 3
    weight, bias = torch.randn(3, 5, generator=draw), torch.randn(3, generator=draw)
    trial._parameters = {
        "weight": nn.Parameter(weight, requires_grad=False),
        "bias": None if module.bias is None else nn.Parameter(bias, requires_grad=False),
    }
    x = torch.randn(4, 5, generator=draw)
    try:
        out = trial(x)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return False
    want = nn.functional.linear(x, weight, trial.bias)
    return isinstance(out, Tensor) and out.shape == want.shape and torch.allclose(out, want, 1e-4)


class Expert(nn.Module):
    """A gated FFN: (act(x W_gᵀ) ⊙ x W_uᵀ) W_dᵀ."""

    def __init__(self, hidden: int, size: int, activation: nn.Module) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, size, bias=False)
        self.up_proj = nn.Linear(hidden, size, bias=False)
        self.down_proj = nn.Linear(size, hidden, bias=False)
        self.act = activation

    def forward(self, x: Tensor) -> Tensor:
        """x [M, D] → [M, D]."""
        y: Tensor = self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
        return y


class MoeFfn(nn.Module):
    """Routed experts beside a shared one. Tensor names are those of a
    `qwen2_moe` checkpoint below `mlp`.

    Experts are linears that may be packed, hooked or replaced, and run one after the
    other; those that `stack` bound together for inference run at once, as long as
    nothing of that befell them since.
    """

    def __init__(
        self, hidden: int, sizes: ExpertSizes, activation: nn.Module, policy: Policy | None = None
    ) -> None:
        super().__init__()
        self.policy = policy or TopK(sizes.top_k, sizes.renormalize)
        self.gate = Router(hidden, sizes.n, bias=False)
        self.experts = nn.ModuleList(
            [Expert(hidden, sizes.size, activation) for _ in range(sizes.n)]
        )
        self.shared_expert = Expert(hidden, sizes.shared, activation)
        self.shared_expert_gate = Router(hidden, 1, bias=False)
        self._stacked: _Stacked | None = None
        self.every_token = False
        """Recording: every expert gets the very tensor of all tokens; nothing depends on data."""

    def weights(self, x: Tensor) -> Tensor:
        """Routing weights [M, N] of tokens x [M, D] in x's dtype, 0 where a token
        does not visit an expert."""
        scores = self.gate(x)
        weights = torch.softmax(scores, dim=1, dtype=torch.float32) * self.policy.select(scores)
        if self.policy.renormalize:
            weights = weights / weights.sum(dim=1, keepdim=True)
        return weights.to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] → [..., D]."""
        flat = x.reshape(-1, x.shape[-1])
        weights = self.weights(flat)
        y = torch.sigmoid(self.shared_expert_gate(flat)) * self.shared_expert(flat)
        together = self._together()
        if together is None:
            self._add_one_by_one(y, flat, weights)
        else:
            most = self.policy.k if isinstance(self.policy, TopK) else None
            act = self._activation()
            y = y + routed_experts(
                flat, weights, together.gate_up, together.down, act=act, most=most
            )
        out: Tensor = y.view(x.shape)
        return out

    def _add_one_by_one(self, y: Tensor, x: Tensor, weights: Tensor) -> None:
        for index, expert in enumerate(self.experts):
            if self.every_token:
                y += expert(x) * weights[:, index, None]
                continue
            # Experts that no token visits run on no rows, so that whoever
            # records inputs sees every expert.
            rows = weights[:, index].nonzero()[:, 0]
            y.index_add_(0, rows, expert(x[rows]) * weights[rows, index, None])

    def _linears(self) -> list[nn.Module] | None:
        """Gate, up and down projection of every routed expert; None where an expert
        does more than to call them."""
        if any(type(expert) is not Expert or is_hooked(expert) for expert in self.experts):
            return None
        return [
            linear
            for expert in self.experts
            for linear in expert.children()
            if linear is not expert.act
        ]

    def _together(self) -> _Stacked | None:
        """What computes all experts at once; None where one of them got
        hooks or weights of its own.

        Stacked weights that others took the place of are let go.
        """
        if self._stacked is None:
            return None
        linears = self._linears()
        if linears is None:
            return None
        if not self._stacked.holds([linear._parameters.get("weight") for linear in linears]):
            self._stacked = None
        return self._stacked if all(map(_is_plain, linears)) else None

    def _activation(self) -> Callable[[Tensor], Tensor]:
        act: Callable[[Tensor], Tensor] = self.shared_expert.act
        return F.silu if is_silu(act) else act

    @property
    def is_stacked(self) -> bool:
        """Whether all routed experts are computed at once."""
        return self._stacked is not None

    def stack(self) -> bool:
        """Compute all routed experts at once from now on, where they are plain linears of
        one dtype → whether they are.

        Their weights become views of two stacked tensors: names, values and memory stay what
        they were. From then on they learn nothing. Experts with hooks, packed or not in
        memory are left as they are, and so are those that get hooks or other weights later. A
        copy of the module is not stacked.
        """
        self._stacked = None
        linears = self._linears()
        if linears is None or not all(map(_is_plain, linears)):
            return False
        if len({(linear.weight.dtype, linear.weight.device) for linear in linears}) != 1:
            return False
        with torch.no_grad():
            gate_up = _bind(self.experts, "gate_proj", "up_proj")
            down = _bind(self.experts, "down_proj")
        self._stacked = _Stacked(gate_up, down, [linear.weight for linear in linears])
        return True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MoeFfn:
        # Casts and moves give every linear a weight of its own.
        again, self._stacked = self.is_stacked, None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if again:
            self.stack()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_stacked": None}


@dataclass(frozen=True)
class _Stacked:
    """Weights of all routed experts together."""

    gate_up: Tensor
    """[N, 2E, D]"""
    down: Tensor
    """[N, D, E]"""
    views: list[Any]
    """The weights of all linears, which are views of the two."""

    def holds(self, weights: list[Any]) -> bool:
        """Whether these are still the views: not others, nor moved or cast one by one."""
        place = (self.down.dtype, self.down.device)
        pairs = zip(weights, self.views, strict=True)
        return all(
            weight is view and (weight.dtype, weight.device) == place for weight, view in pairs
        )


def _is_plain(linear: nn.Module) -> bool:
    # Only what a product with `weight` says whole: loaders that keep weights
    # elsewhere replace `forward`.
    if type(linear) is not nn.Linear or is_hooked(linear):
        return False
    return linear.bias is None and not linear.weight.is_meta


def _bind(experts: nn.ModuleList, *names: str) -> Tensor:
    # Weights of each expert's linears, one below the other: [N, rows, columns];
    # the linears become views of it.
    linears = [[getattr(expert, name) for name in names] for expert in experts]
    first: Tensor = linears[0][0].weight
    rows, columns = first.shape
    stack = torch.empty(
        len(experts), len(names) * rows, columns, dtype=first.dtype, device=first.device
    )
    for of_expert, held in zip(linears, stack, strict=True):
        for linear, view in zip(of_expert, held.split(rows), strict=True):
            linear.weight = nn.Parameter(view.copy_(linear.weight), requires_grad=False)
    return stack


def stack_experts(model: nn.Module) -> int:
    """Let every Mixture of Experts in a loaded model compute its routed
    experts at once → how many do."""
    return sum(ffn.stack() for ffn in model.modules() if isinstance(ffn, MoeFfn))


def place_experts(
    model: nn.Module,
    blocks: str,
    config: Mapping[str, Any],
    policies: Mapping[str, Policy] = MappingProxyType({}),
) -> None:
    """Let the blocks of a transformers model compute their experts by `MoeFfn`,
    without weights on the meta device.

    blocks: name of the list of layers. config: parsed config.json; policies: full name of an FFN →
    how it routes, where not as config.json says. ModelError for sizes that config.json lacks and
    policies that do not fit. A model that is no `qwen2_moe` is left alone: LaDiMo's stock container is
    one, whose router may choose as many experts as a token needs. Experts that stand already
    (`dense_ffn.place_native_experts`) stay as they are.
    """
    ffns: dict[str, nn.Module] = {}
    if config.get("model_type") == CONTAINER:
        sizes = ExpertSizes.of(config)
        for index, block in enumerate(model.get_submodule(blocks).children()):
            if index not in sizes.dense_blocks:
                name = f"{blocks}.{index}.{Experts().ffn}"
                policy = policies.get(name)
                if isinstance(policy, TopK) and policy.k > sizes.n:
                    raise ModelError(
                        f"config.json: routing sends tokens of {name} to {policy.k} of {sizes.n} "
                        "experts"
                    )
                with torch.device("meta"):
                    act = activation(config.get("hidden_act", "silu"))
                    made = MoeFfn(config["hidden_size"], sizes, act, policy)
                ffns[name] = made.to(next(block.parameters()).dtype).eval().requires_grad_(False)
    standing = {name for name, module in model.named_modules() if isinstance(module, MoeFfn)}
    if strangers := sorted(set(policies) - set(ffns) - standing):
        raise ModelError(
            f"config.json: routing names {strangers[0]}, which has no experts in this model"
        )
    for name, ffn in ffns.items():
        model.set_submodule(name, ffn)
