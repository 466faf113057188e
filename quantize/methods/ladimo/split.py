"""Which hidden neurons of a dense FFN go to which expert."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

Construction = Literal["clustered", "contiguous", "random"]

# Of the assignment that costs F³: few, since clusters have settled under the free one before, and
# each costs far more than a round of that.
_BALANCED_ROUNDS = 3
_ROUNDS = 20  # of the free assignment at most; it ends as soon as nothing moves
_STARTS = 3  # k-means finds local optima: each start costs as much as the first


@dataclass(frozen=True)
class Layout:
    """Sizes of the parts of one FFN, in hidden neurons."""

    n: int
    """Routed experts."""
    size: int
    """Neurons of a routed expert."""
    shared: int
    """Neurons of the shared expert."""

    @property
    def neurons(self) -> int:
        """Hidden neurons in all, those of the dense FFN."""
        return self.shared + self.n * self.size


@dataclass(frozen=True)
class Split:
    """A partition of the hidden neurons."""

    layout: Layout
    owner: Tensor
    """int64 [F]: the routed expert 0 … N−1 of every neuron, N for the shared expert."""

    def of_expert(self, index: int) -> Tensor:
        """Neurons of a routed expert (N: of the shared one), in their order in the dense FFN."""
        return (self.owner == index).nonzero()[:, 0]


def contiguous(layout: Layout) -> Split:
    """Neurons in their order, the shared expert's first: the split as published,
    with a shared expert added."""
    owner = torch.arange(layout.neurons) - layout.shared
    return Split(
        layout,
        torch.where(owner < 0, layout.n, torch.div(owner, layout.size, rounding_mode="floor")),
    )


def shuffle(layout: Layout, seed: int) -> Split:
    """Neurons at random."""
    order = torch.randperm(layout.neurons, generator=torch.Generator().manual_seed(seed))
    return Split(layout, contiguous(layout).owner[order])


def cluster(layout: Layout, contributions: Tensor, seed: int) -> Split:
    """The neurons that contribute most are shared, the others are grouped by
    the tokens they contribute to.

    contributions: |h|·‖w_d‖ [M, F] of every neuron to the output, on a sample of tokens. Spherical
    k-means over the neurons' columns, its last rounds with clusters of one size (a linear
    assignment, as in CMoE's construction, arXiv 2502.04416), the best of a few starts.
    """
    energy = contributions.square().mean(dim=0)
    order = energy.argsort(descending=True, stable=True)
    owner = torch.full((layout.neurons,), layout.n, dtype=torch.int64)
    routed = order[layout.shared :].sort().values
    if layout.n == 1:
        owner[routed] = 0
    elif layout.n:
        columns = contributions[:, routed]
        columns = columns / columns.norm(dim=0).clamp_min(torch.finfo(columns.dtype).tiny)
        found = [_group(columns, layout, seed + start) for start in range(_STARTS)]
        owner[routed] = max(found, key=lambda pair: pair[0])[1]
    return Split(layout, owner)


def _group(columns: Tensor, layout: Layout, seed: int) -> tuple[float, Tensor]:
    """(sum of cosines, expert of every column) of one start; columns [M, n·size] of length 1."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randperm(columns.shape[1], generator=generator)[: layout.n]
    centres = columns[:, picks.to(columns.device)]
    for assign, rounds in ((_assign_nearest, _ROUNDS), (_assign_balanced, _BALANCED_ROUNDS)):
        before = None
        for _ in range(rounds):
            likeness = columns.T @ (
                centres / centres.norm(dim=0).clamp_min(torch.finfo(columns.dtype).tiny)
            )
            group = assign(likeness, layout)
            if before is not None and torch.equal(group, before):
                break
            before = group
            members = torch.nn.functional.one_hot(group, layout.n).to(columns.dtype)
            sums = columns @ members
            # an empty cluster keeps its centre
            centres = torch.where(members.sum(dim=0) > 0, sums, centres)
    return float(likeness.gather(1, group[:, None]).double().sum()), group.cpu()


def _assign_nearest(likeness: Tensor, layout: Layout) -> Tensor:
    return likeness.argmax(dim=1)


def _assign_balanced(likeness: Tensor, layout: Layout) -> Tensor:
    """Groups of `size` columns each with the largest sum of likeness [n·size, n]."""
    _, seats = linear_sum_assignment(
        likeness.double().cpu().numpy().repeat(layout.size, axis=1), maximize=True
    )
    return torch.from_numpy(seats // layout.size).to(likeness.device)


def split(
    construction: Construction, layout: Layout, contributions: Callable[[], Tensor], seed: int
) -> Split:
    """Split by name; contributions (see `cluster`) are computed where they are needed."""
    if construction == "clustered":
        return cluster(layout, contributions(), seed)
    return contiguous(layout) if construction == "contiguous" else shuffle(layout, seed)
