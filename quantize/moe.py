"""A Mixture of Experts as pq computes it: one linear an expert and role, named as checkpoints name them.

transformers keeps the experts of a block in two stacked tensors, which no linear of pq's could stand in for; the
function is the same: y = Σ_e w_e(x)·E_e(x) + σ(g·x)·S(x), with w the softmax of the router's scores where the policy
selects expert e, else 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from quantize.arch import Architecture, ExpertSizes
from quantize.errors import ModelError
from quantize.formats.routing import Policy, Threshold, TopK, policy_from_json

__all__ = ["Expert", "MoeFfn", "Policy", "Router", "Threshold", "TopK", "place_experts", "policy_from_json"]


class Router(nn.Linear):
    """A linear that decides how much of an expert a token gets; never quantized, and no linear to recipes."""


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
    """Routed experts beside a shared one. Tensor names are those of a `qwen2_moe` checkpoint below `mlp`."""

    def __init__(self, hidden: int, sizes: ExpertSizes, activation: nn.Module, policy: Policy | None = None) -> None:
        super().__init__()
        self.policy = policy or TopK(sizes.top_k, sizes.renormalize)
        self.gate = Router(hidden, sizes.n, bias=False)
        self.experts = nn.ModuleList([Expert(hidden, sizes.size, activation) for _ in range(sizes.n)])
        self.shared_expert = Expert(hidden, sizes.shared, activation)
        self.shared_expert_gate = Router(hidden, 1, bias=False)

    def weights(self, x: Tensor) -> Tensor:
        """Routing weights [M, N] of tokens x [M, D] in x's dtype, 0 where a token does not visit an expert."""
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
        for index, expert in enumerate(self.experts):
            # Experts that no token visits run on no rows, so that whoever records inputs sees every expert.
            rows = weights[:, index].nonzero()[:, 0]
            y.index_add_(0, rows, expert(flat[rows]) * weights[rows, index, None])
        out: Tensor = y.view(x.shape)
        return out


def place_experts(
    model: nn.Module,
    arch: Architecture,
    config: Mapping[str, Any],
    policies: Mapping[str, Policy] = MappingProxyType({}),
) -> None:
    """Let the blocks of a transformers model compute their experts by `MoeFfn`, without weights on the meta device.

    config: parsed config.json; policies: full name of an FFN → how it routes, where not as config.json says. ModelError
    for sizes that config.json lacks and policies that do not fit. A model whose FFNs are dense is left alone.
    """
    ffns: dict[str, nn.Module] = {}
    if arch.experts is not None:
        sizes = ExpertSizes.of(config)
        for index, block in enumerate(model.get_submodule(arch.blocks).children()):
            if index not in sizes.dense_blocks:
                name = f"{arch.blocks}.{index}.{arch.experts.ffn}"
                policy = policies.get(name)
                if isinstance(policy, TopK) and policy.k > sizes.n:
                    raise ModelError(f"config.json: routing sends tokens of {name} to {policy.k} of {sizes.n} experts")
                with torch.device("meta"):
                    made = MoeFfn(config["hidden_size"], sizes, ACT2FN[config.get("hidden_act", "silu")], policy)
                ffns[name] = made.to(next(block.parameters()).dtype).eval().requires_grad_(False)
    if strangers := sorted(set(policies) - set(ffns)):
        raise ModelError(f"config.json: routing names {strangers[0]}, which has no experts in this model")
    for name, ffn in ffns.items():
        model.set_submodule(name, ffn)
