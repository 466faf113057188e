"""One option an item, least total error within a budget: the exact multiple-choice
knapsack by dynamic programming."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Budgets that the search tells apart. Costs are rounded up to 1/65536 of their range where they
# have no coarser unit; time and memory grow with the cells times the items.
_CELLS = 1 << 16


def knapsack(
    costs: Sequence[Sequence[int]], errors: Sequence[Sequence[float]], budget: int
) -> list[int]:
    """Choose one option an item so that costs stay within the budget
    and the sum of errors is least.

    The first option of every item is its cheapest. Exact where the costs' greatest common divisor
    leaves at most 65536 distinct budgets; else costs above the cheapest are rounded up to 1/65536
    of their whole range. Either way a larger budget never gives a larger error. Raises ValueError
    where the cheapest options exceed the budget.
    """
    spare = budget - sum(options[0] for options in costs)
    if spare < 0:
        raise ValueError(f"the cheapest choice exceeds the budget by {-spare}")
    extra = [[cost - options[0] for cost in options] for options in costs]
    span = sum(max(options) for options in extra)
    unit = max(math.gcd(*itertools.chain.from_iterable(extra)), math.ceil(span / _CELLS), 1)
    everything = sum(-(-max(options) // unit) for options in extra)
    cells = (everything if spare >= span else spare // unit) + 1
    least = torch.zeros(cells, dtype=torch.float64)  # error by units that may be spent
    taken: list[Tensor] = []
    for options, sizes in zip(errors, extra, strict=True):
        best, choice = torch.full_like(least, math.inf), torch.zeros(cells, dtype=torch.uint8)
        for option, (error, size) in enumerate(zip(options, sizes, strict=True)):
            steps = -(-size // unit)
            if steps < cells:
                found = least[: cells - steps] + error
                better = found < best[steps:]  # an equal error is not worth more bits
                best[steps:][better] = found[better]
                choice[steps:][better] = option
        least = best
        taken.append(choice)
    picks: list[int] = []
    left = cells - 1
    for choice, sizes in zip(reversed(taken), reversed(extra), strict=True):
        picks.append(int(choice[left]))
        left -= -(-sizes[picks[-1]] // unit)
    return picks[::-1]


def total(errors: Sequence[Sequence[float]], picks: Sequence[int]) -> float:
    """Sum of the errors of a choice, added up in the order in which `knapsack` does."""
    return sum((options[pick] for options, pick in zip(errors, picks, strict=True)), 0.0)
