"""Which experts a token visits: the policies of routers, and how config.json says them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


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
    if kind == "threshold" and set(facts) == {"policy", "threshold"}:
        threshold = facts["threshold"]
        # NaN would send every token to no expert at all.
        if type(threshold) in (int, float) and math.isfinite(threshold):
            return Threshold(float(threshold))
    raise ValueError(f"policy {facts!r} is not one that pq knows; install a newer pq-quantize")
