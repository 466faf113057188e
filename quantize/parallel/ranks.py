"""Processes that convert or measure one model together, and the one that works alone.

In a conversion every process ("rank") holds all hidden states and every block. Where work is
divided, each computes its share and receives the others', so that all of them hold the same bits
afterwards, those that one process alone would hold. Every method of `Ranks` but the plain sums is a
meeting: all ranks must call it, in the same order and with arguments of the same shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class Ranks:
    """One process alone: everything is its own, and nothing is sent."""

    rank = 0
    size = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def rounds(self, batches: int) -> Iterator[tuple[int, int]]:
        """Yield (batch to compute here, how many ranks have one of their own), round by round.

        In a round rank r has the batch that follows rank r − 1's. Ranks for which none is left
        compute the last one, so that they know its shapes; what they find is not used.
        """
        for start in range(0, batches, self.size):
            yield min(start + self.rank, batches - 1), min(self.size, batches - start)

    def owners(self, sizes: Sequence[int]) -> list[int]:
        """A rank for each piece of work, given their sizes: the largest first,
        each to who has least to do."""
        loads, out = [0] * self.size, [0] * len(sizes)
        for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
            out[i] = loads.index(min(loads))
            loads[out[i]] += sizes[i]
        return out

    def tell(self, data: Any, source: int = 0) -> Any:
        """JSON data of one rank, for all."""
        return data

    def gather(self, data: Any) -> list[Any]:
        """JSON data of every rank, in their order."""
        return [data]

    def tensors(self, named: Mapping[str, Tensor] | None, source: int = 0) -> dict[str, Tensor]:
        """Tensors of one rank, for all, bit for bit; the others give None."""
        return dict(named or {})

    def copy(self, tensor: Tensor, source: int) -> Tensor:
        """The tensor of one rank, for all; the others give one of the same shape and
        dtype, which is overwritten."""
        return tensor

    def numbers(self, tasks: Sequence[Callable[[], float]]) -> list[float]:
        """Results of all tasks, each computed by one rank."""
        return [task() for task in tasks]

    def add(self, total: Tensor | None, part: Tensor, present: int) -> Tensor:
        """Add a round's parts, float32 [...], to a total: those of the first `present`
        ranks, in the order of ranks.

        Between rounds every rank holds a piece of the total; `whole` puts the pieces together.
        """
        return part if total is None else total.add_(part)

    def whole(self, total: Tensor, shape: Sequence[int]) -> Tensor:
        """The sum that `add` has made, with the shape of its parts."""
        return total

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank."""
        return any(self.gather(flag))

    def release(self) -> None:
        """Say that all shared work is done: the first rank finishes alone, and no longer
        minds what befalls others."""

    def explain(self) -> AbstractContextManager[None]:
        """Turn errors of communication into what is known about the rank that failed."""
        return nullcontext()


ALONE = Ranks()
