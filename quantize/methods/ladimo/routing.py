"""A linear router: fitted to what the experts contribute, read by a policy."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from quantize.model.moe import Policy, Threshold, TopK

# Adam on the loss of a logistic regression, which is convex: more steps and larger batches come
# nearer its minimum and cost time in proportion, in every layer that is searched.
_STEPS = 300
_BATCH = 4096  # tokens
_RATE = 0.02
BINS = 48
"""Bins of a profile."""


@dataclass(frozen=True)
class Budget:
    """How many routed experts a token visits, and by which policy."""

    mean: float
    """Mean over tokens."""
    adaptive: bool
    """Whether tokens may visit more or fewer; needs no whole `mean`."""

    @classmethod
    def plain(cls, mean: float) -> Budget:
        """A fixed number of experts where `mean` is a whole one, else a threshold."""
        return cls(mean, adaptive=mean != round(mean) or mean == 0)

    @property
    def k(self) -> int:
        """Experts of a token where it is the same for all."""
        return round(self.mean)

    def select(self, scores: Tensor) -> Tensor:
        """Experts to visit, by the largest scores [M, N] in all or of each token: bool [M, N]."""
        if self.adaptive:
            return scores > threshold(scores, self.mean)
        return TopK(self.k).select(scores)

    def policy(self, scores: Tensor) -> Policy:
        """What routes a token so, given the router's scores [M, N] on many."""
        if not self.adaptive:
            return TopK(self.k)
        value = threshold(scores, self.mean)
        # Below all scores: a checkpoint holds no infinite threshold.
        return Threshold(value) if value > -math.inf else TopK(scores.shape[1])


def threshold(scores: Tensor, mean: float) -> float:
    """The value that `mean` scores of a row [N] exceed, on average over
    the rows of scores [M, N]."""
    flat = scores.flatten()
    rank = len(flat) - round(mean * len(scores))  # so many stay at or below it
    if rank <= 0:
        return -math.inf
    return float(flat.kthvalue(min(rank, len(flat))).values)


def fit_router(x: Tensor, energies: Tensor, budget: Budget, seed: int) -> Tensor:
    """Router [N, D] that predicts from inputs x [M, D] which experts contribute most.

    energies: ‖E_e(x)‖² [M, N] of what every expert would add. The oracle visits the experts of
    largest energy, within the budget; the router is a logistic regression on that choice. Its
    scores have unit standard deviation over x, so that thresholds, the step size of later training
    and the temperature of `moe` mean the same in every layer.
    """
    wanted = budget.select(energies).to(x.dtype)
    router = torch.zeros(
        energies.shape[1], x.shape[1], device=x.device, dtype=x.dtype
    ).requires_grad_()
    scale = x.square().mean().sqrt()
    optimizer = torch.optim.Adam([router], lr=_RATE)
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for _ in range(_STEPS):
            rows = torch.randint(len(x), (min(_BATCH, len(x)),), generator=generator).to(x.device)
            loss = F.binary_cross_entropy_with_logits((x[rows] / scale) @ router.T, wanted[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    router = router.detach()
    return router / (x @ router.T).std().clamp_min(torch.finfo(x.dtype).tiny)


def profile(scores: Tensor, policy: Policy) -> dict[str, object]:
    """Routing of many tokens in figures: a histogram of scores [M, N], and of how
    many experts a token visits."""
    visited = policy.select(scores)
    low, high = float(scores.min()), float(scores.max())
    visits = visited.sum(dim=1)
    return {
        "edges": [low + (high - low) * i / BINS for i in range(BINS + 1)],
        "counts": torch.histc(scores.float(), bins=BINS, min=low, max=high).long().tolist(),
        "threshold": policy.threshold if isinstance(policy, Threshold) else None,
        "visits": torch.bincount(visits, minlength=scores.shape[1] + 1).tolist(),
        "load": [float(share) for share in visited.float().mean(dim=0)],
        "mean_experts": float(visits.double().mean()),
    }
