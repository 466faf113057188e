"""A Mixture of Experts as pq computes it: one linear an expert and role, named as checkpoints name them.

transformers keeps the experts of a block in two stacked tensors, which no linear of pq's could stand in for; the
function is the same: y = Σ_e w_e(x)·E_e(x) + σ(g·x)·S(x), with w the softmax of the router's scores where the policy
selects expert e, else 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from quantize.arch import Architecture, ExpertSizes


@dataclass(frozen=True)
class TopK:
    """Every token visits the k experts of highest score, as stock loaders route."""

    k: int
    renormalize: bool = False
    """Whether the weights of the chosen experts are scaled to add up to 1."""

    def select(self, scores: Tensor) -> Tensor:
        """Scores [M, N] → whether a token visits an expert [M, N]."""
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        return chosen.scatter_(1, scores.topk(self.k, dim=1).indices, True)

    def as_json(self) -> dict[str, Any]:
        """As config.json of a native checkpoint holds it."""
        return {"policy": "top-k", "k": self.k, "renormalize": self.renormalize}


@dataclass(frozen=True)
class Threshold:
    """A token visits every expert whose score exceeds a threshold: none, a few or all."""

    threshold: float
    """In units of the router's scores, before the softmax."""

    renormalize = False

    def select(self, scores: Tensor) -> Tensor:
        """Scores [M, N] → whether a token visits an expert [M, N]."""
        return scores > self.threshold

    def as_json(self) -> dict[str, Any]:
        """As config.json of a native checkpoint holds it."""
        return {"policy": "threshold", "threshold": self.threshold}


Policy = TopK | Threshold


def policy_from_json(facts: Mapping[str, Any]) -> Policy:
    """Read what `as_json` wrote; ValueError for anything else."""
    kind = facts.get("policy") if isinstance(facts, Mapping) else None
    if kind == "top-k" and set(facts) == {"policy", "k", "renormalize"}:
        k, renormalize = facts["k"], facts["renormalize"]
        if type(k) is int and k > 0 and type(renormalize) is bool:
            return TopK(k, renormalize)
    if kind == "threshold" and set(facts) == {"policy", "threshold"} and isinstance(facts["threshold"], int | float):
        return Threshold(float(facts["threshold"]))
    raise ValueError(f"routing policy {facts!r} is not one that pq knows; install a newer pq-quantize")


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


def place_experts(model: nn.Module, arch: Architecture, config: Mapping[str, Any]) -> None:
    """Let the blocks of a transformers model compute their experts by `MoeFfn`, without weights on the meta device.

    config: parsed config.json; ModelError for sizes that it lacks. A model whose FFNs are dense is left alone.
    """
    if arch.experts is None:
        return
    sizes = ExpertSizes.of(config)
    for index, block in enumerate(model.get_submodule(arch.blocks).children()):
        if index not in sizes.dense_blocks:
            with torch.device("meta"):
                ffn = MoeFfn(config["hidden_size"], sizes, ACT2FN[config.get("hidden_act", "silu")])
            block.set_submodule(arch.experts.ffn, ffn.to(next(block.parameters()).dtype).eval().requires_grad_(False))
