"""Work on a CPU's cores: by one thread where operations are tiny, independent work side by side, and what
will be asked for later meanwhile."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
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


def spare_threads() -> int:
    """CPU threads for what goes on beside a solver, which keeps about one busy; 0 where there is but one."""
    return torch.get_num_threads() // 2


class Beside:
    """A thread that does jobs one after the other, with a part of the CPU threads that torch has here.

    For what is bound to one thread, as greenlets are, and need not be waited for at once. Begins with the
    first job and ends with this object, after the jobs that it was given.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        # Not an executor: `put` alone may be called by a destructor, which the collector may run anywhere.
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._grad = torch.is_grad_enabled()

    @property
    def is_here(self) -> bool:
        """Whether it is this thread that asks."""
        return threading.current_thread() is self._thread

    def begin(self, job: Callable[[], Result]) -> Future[Result]:
        """Let the thread do a job when it has done those before it."""
        future: Future[Result] = Future()

        def run() -> None:
            try:
                future.set_result(job())
            except BaseException as err:  # raised where the result is asked for
                future.set_exception(err)

        if self._thread is None:
            arguments = (self._jobs, self._threads, self._grad)
            self._thread = threading.Thread(target=_work, args=arguments, daemon=True)
            self._thread.start()
            _beside[self] = self._thread
        self._jobs.put(run)
        return future

    def do(self, job: Callable[[], Result]) -> Result:
        """What a job returns that is done in the thread, by itself or for another one that waits."""
        return job() if self.is_here else self.begin(job).result()

    def leave(self, job: Callable[[], None]) -> None:
        """Let the thread do a last job, of which nobody waits for the end; for destructors."""
        if self.is_here:
            job()
        elif self._thread is not None:
            self._jobs.put(job)

    def end(self) -> None:
        """Let the thread end when it has done its jobs."""
        self._jobs.put(None)

    def __del__(self) -> None:
        self.end()


_beside: weakref.WeakKeyDictionary[Beside, threading.Thread] = weakref.WeakKeyDictionary()


@atexit.register
def _end_all() -> None:
    """Let threads end before the interpreter does: one that computes then would take the process down."""
    for beside, thread in list(_beside.items()):
        beside.end()
        thread.join()


def _work(jobs: SimpleQueue[Callable[[], None] | None], threads: int, grad: bool) -> None:
    # Both are a thread's own.
    torch.set_num_threads(threads)
    torch.set_grad_enabled(grad)
    while (job := jobs.get()) is not None:
        job()
        del job  # with all that it holds, before the next one is waited for


def _large(*work: Work) -> bool:
    """Whether operations on so much work keep several threads of a CPU busy, or run on a GPU."""
    tensors = [one for one in work if isinstance(one, Tensor)]
    if any(one.is_cuda for one in tensors):
        return True
    return sum(one if isinstance(one, int) else one.numel() for one in work) > _SMALL
