"""Work on a CPU's cores: by one thread where operations are tiny, and independent work side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

# Elements, below which a second thread costs more than it brings.
_SMALL = 1 << 20

Result = TypeVar("Result")
Work = Tensor | int
"""What operations work on: tensors, or how many elements."""


@contextmanager
def few_threads(*work: Work) -> Iterator[None]:
    """Run a loop of operations on so much work, all of it together, on one CPU thread if they are tiny.

    Waking a second thread and waiting for it costs more than it brings, and on a machine that others use tens of
    times more.
    """
    threads = torch.get_num_threads()
    if threads == 1 or _large(*work):
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def side_by_side(jobs: Sequence[Callable[[], Result]], *work: Work) -> list[Result]:
    """What independent jobs return, in order; work: what operations of a job work on, all of it together.

    On a CPU each job is done by one thread, as many at a time as torch has; if operations are large enough, by all
    threads one after the other. Interpreted code between operations does not run at once: operations of a few
    microseconds gain nothing.
    """
    threads = at_once(len(jobs), *work)
    if threads <= 1:
        with few_threads(*work):
            return [job() for job in jobs]
    grad = torch.is_grad_enabled()

    def begin() -> None:
        # Both are a thread's own.
        torch.set_num_threads(1)
        torch.set_grad_enabled(grad)

    with ThreadPoolExecutor(threads, initializer=begin) as pool:
        return list(pool.map(lambda job: job(), jobs))


def at_once(jobs: int, *work: Work) -> int:
    """How many of so many jobs `side_by_side` does at a time on a CPU."""
    return 1 if _large(*work) else min(jobs, torch.get_num_threads())


def _large(*work: Work) -> bool:
    """Whether operations on so much work keep several threads of a CPU busy, or run on a GPU."""
    tensors = [one for one in work if isinstance(one, Tensor)]
    if any(one.is_cuda for one in tensors):
        return True
    return sum(one if isinstance(one, int) else one.numel() for one in work) > _SMALL
