"""In which order waiting requests are admitted, and which are refused.

`fcfs` is vLLM's order. `sjf`, `lsf`, `prism` and `fineserve` follow the rules in FineServe's code
(scheduling_algorithm/algorithm.py), whose queue stands in front of the engine.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class View:
    """What a policy knows when it is asked."""

    now: float
    ttft: float
    """Goal in seconds; infinite where there is none."""
    token_seconds: float
    """That a token of a prompt is reckoned to take."""
    batched: int
    """Tokens ahead of any admitted now: running sequences and the rest of a prompt."""
    drop: bool
    """Whether those that cannot meet the goal are refused."""


class Queue(Protocol):
    """Waiting requests."""

    def put(self, request: int) -> None:
        """One more; requests come in the order of their arrival."""

    def take(self, request: int) -> None:
        """One that `choose` gave is admitted."""

    def choose(self, view: View) -> tuple[deque[int], list[int]]:
        """(requests in the order in which they are to be admitted, those refused, which are gone)."""

    def __len__(self) -> int: ...


class Fcfs:
    """First come, first served."""

    def __init__(self, arrival: list[float], inputs: list[int]) -> None:
        self.arrival, self.inputs = arrival, inputs
        self.queue: deque[int] = deque()
        self.put = self.queue.append

    def __len__(self) -> int:
        return len(self.queue)

    def take(self, request: int) -> None:
        """`choose` gives the queue itself, from which it is taken already."""

    def choose(self, view: View) -> tuple[deque[int], list[int]]:
        """See `Queue`."""
        refused: list[int] = []
        if view.drop:
            queue = self.queue
            while queue and late(self, queue[0], view, 0):
                refused.append(queue.popleft())
        return self.queue, refused


def late(queue: Fcfs | _Sorted, request: int, view: View, batched: int) -> bool:
    """Whether a request misses its goal even if it is the next one, behind so many tokens."""
    ends = view.now + view.token_seconds * (queue.inputs[request] + batched)
    return ends >= queue.arrival[request] + view.ttft


class _Sorted:
    """Requests in the order of a key, lowest first; their arrival decides between equals."""

    def __init__(self, arrival: list[float], inputs: list[int]) -> None:
        self.arrival, self.inputs = arrival, inputs
        self._queue: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return len(self._queue)

    def key(self, request: int) -> float:
        """What they stand in the order of."""
        return self.arrival[request]

    def put(self, request: int) -> None:
        bisect.insort(self._queue, (self.key(request), request))

    def take(self, request: int) -> None:
        if self._queue[0][1] == request:
            del self._queue[0]
        else:
            self._queue.remove((self.key(request), request))

    def _refuse(self, view: View, batched: int) -> list[int]:
        """Take out those that cannot meet the goal, if they are to be dropped."""
        if not view.drop:
            return []
        refused = [r for _, r in self._queue if late(self, r, view, batched)]
        if refused:
            gone = set(refused)
            self._queue = [entry for entry in self._queue if entry[1] not in gone]
        return refused

    def choose(self, view: View) -> tuple[deque[int], list[int]]:
        """See `Queue`."""
        refused = self._refuse(view, 0)
        return deque(r for _, r in self._queue), refused


class Sjf(_Sorted):
    """Shortest prompt first."""

    def key(self, request: int) -> float:
        """Tokens of the prompt."""
        return self.inputs[request]


class Lsf(_Sorted):
    """Longest slowdown first: waiting time over the tokens it would be computed with."""

    def choose(self, view: View) -> tuple[deque[int], list[int]]:
        """See `Queue`."""
        refused = self._refuse(view, 0)
        arrival, inputs = self.arrival, self.inputs
        order = sorted(
            (r for _, r in self._queue),
            key=lambda r: (arrival[r] - view.now) / (view.batched + inputs[r]),
        )
        return deque(order), refused


class _Deadlines(_Sorted):
    """Those that together meet every goal: the longest prompts stay behind until all others do."""

    def choose(self, view: View) -> tuple[deque[int], list[int]]:
        """See `Queue`."""
        refused = self._refuse(view, view.batched)
        waiting = np.array([r for _, r in self._queue], dtype=np.int64)
        if not len(waiting):
            return deque(), refused
        lengths = np.array([self.inputs[r] for r in waiting])
        due = np.array([self.arrival[r] for r in waiting]) + view.ttft
        alone = view.now + view.token_seconds * (lengths + view.batched) < due
        hopeless = waiting[~alone]  # none if they are refused
        slack = (due[alone] - view.now) / view.token_seconds - view.batched
        kept = self.kept(lengths[alone], slack)
        return deque([*waiting[alone][kept].tolist(), *hopeless.tolist()]), refused

    def kept(self, lengths: NDArray[np.int64], slack: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which stay, each with its length and the tokens that may be computed up to its own last."""
        raise NotImplementedError


class FineServe(_Deadlines):
    """All chosen are taken to be computed in one batch, which ends before any goal."""

    def kept(self, lengths: NDArray[np.int64], slack: NDArray[np.float64]) -> NDArray[np.bool_]:
        """See `_Deadlines`."""
        order = np.argsort(lengths, kind="stable")
        together = np.cumsum(lengths[order]) < np.minimum.accumulate(slack[order])
        count = int(np.flatnonzero(together)[-1]) + 1 if together.any() else 0
        mask = np.zeros(len(lengths), dtype=bool)
        mask[order[:count]] = True
        return mask


class Prism(_Deadlines):
    """Each chosen one is taken to be computed after those that came before it."""

    def kept(self, lengths: NDArray[np.int64], slack: NDArray[np.float64]) -> NDArray[np.bool_]:
        """See `_Deadlines`."""
        mask = np.ones(len(lengths), dtype=bool)
        for longest in np.argsort(-lengths, kind="stable"):
            if (np.cumsum(lengths * mask) < slack)[mask].all():
                break
            mask[longest] = False
        return mask


POLICIES: dict[str, Callable[[list[float], list[int]], Queue]] = {
    "fcfs": Fcfs,
    "sjf": Sjf,
    "lsf": Lsf,
    "prism": Prism,
    "fineserve": FineServe,
}
