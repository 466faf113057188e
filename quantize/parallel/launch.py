"""Processes of one launch (accelerate, torchrun, or RANK and WORLD_SIZE by hand)
that meet by torch.distributed.

Tensors on a CPU travel by gloo, those on CUDA devices by NCCL.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from quantize.errors import LostError, StoppedError, UsageError
from quantize.parallel.ranks import ALONE, Ranks
from quantize.parallel.watch import Watch

# for processes that start apart: schedulers of clusters hand out machines one after the other
_TO_JOIN = timedelta(minutes=30)
# while another rank works: `Watch`, not a time limit, says that it is gone
_TO_WAIT = timedelta(days=60)


def is_launched() -> bool:
    """Whether this process is one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def local_rank() -> int:
    """Which of the launch's processes on this machine this is; 0 for one alone."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0"))) if is_launched() else 0


@contextmanager
def join(
    remedy: str, abandon: Callable[[LostError], None], met: Callable[[], None] = lambda: None
) -> Iterator[Ranks]:
    """Join the other processes of the launch; for a process that works alone this does nothing.

    An error that leaves the context is told to the others, for whom it becomes a LostError wherever
    they are; so does the death of a process, with `remedy` behind it. `abandon` ends a process that
    could not unwind (it runs in another thread, and must not return). `met` is called once all
    processes are there, before any of them goes on.
    """
    if not is_launched():
        yield ALONE
        return
    cuda = torch.cuda.is_available() and dist.is_nccl_available()
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_TO_JOIN)
        met()
        ranks = _Launch(remedy, abandon)
    except (KeyError, OSError, RuntimeError, ValueError) as err:
        place = ":".join(
            os.environ.get(name, f"${name}") for name in ("MASTER_ADDR", "MASTER_PORT")
        )
        reason = (str(err).strip().splitlines() or [type(err).__name__])[0]
        raise UsageError(
            f"the other processes of the launch were not met at {place} ({reason})"
        ) from None
    with ranks.watch:
        try:
            yield ranks
        except (
            StoppedError
        ):  # where the first died before it could stop with the others, they say so
            _leave(ranks)
            raise
        _leave(ranks)
    dist.destroy_process_group()


def _leave(ranks: _Launch) -> None:
    """Wait until the first is done; LostError where it is gone. It waits for nobody."""
    with suppress(RuntimeError) if ranks.first else ranks.explain():
        ranks.tell(None)


class _Launch(Ranks):
    """One of several processes."""

    def __init__(self, remedy: str, abandon: Callable[[LostError], None]) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(timeout=_TO_WAIT)
        host = os.environ["MASTER_ADDR"]
        token = self.tell(secrets.token_hex(16))
        self.watch = Watch(self.rank, self.size, token, remedy, abandon)
        self.watch.connect(host, self.tell(self.watch.listen(host) if self.first else None))

    def tell(self, data: Any, source: int = 0) -> Any:
        text = bytearray(json.dumps(data).encode())
        size = int(self.copy(torch.tensor([len(text)]), source))
        buffer = text if self.rank == source else bytearray(size)
        return json.loads(
            bytes(self.copy(torch.frombuffer(buffer, dtype=torch.uint8), source).numpy())
        )

    def gather(self, data: Any) -> list[Any]:
        return [self.tell(data, source) for source in range(self.size)]

    def tensors(self, named: Mapping[str, Tensor] | None, source: int = 0) -> dict[str, Tensor]:
        mine = named if self.rank == source and named is not None else {}
        known = {
            n: [str(t.dtype).removeprefix("torch."), list(t.shape), t.device.type]
            for n, t in mine.items()
        }
        out: dict[str, Tensor] = {}
        for name, (dtype, shape, device) in self.tell(known, source).items():
            tensor = (
                mine[name]
                if mine
                else torch.empty(shape, dtype=getattr(torch, dtype), device=device)
            )
            out[name] = self.copy(tensor, source)
        return out

    def copy(self, tensor: Tensor, source: int) -> Tensor:
        plain = tensor.detach().contiguous()
        if plain.numel():
            dist.broadcast(plain.view(-1).view(torch.uint8), source, group=self._group)
        return plain

    def numbers(self, tasks: Sequence[Callable[[], float]]) -> list[float]:
        found = self.gather([task() for task in tasks[self.rank :: self.size]])
        return [found[i % self.size][i // self.size] for i in range(len(tasks))]

    def add(self, total: Tensor | None, part: Tensor, present: int) -> Tensor:
        # Every rank adds up a piece of the sum: each part travels once, not to all ranks.
        piece = -(-part.numel() // self.size)
        sent = part.flatten()
        if spare := piece * self.size - len(sent):
            sent = F.pad(sent, (0, spare))
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self._group)
        for one in received.view(self.size, piece)[:present]:
            total = one.clone() if total is None else total.add_(one)
        assert total is not None
        return total

    def whole(self, total: Tensor, shape: Sequence[int]) -> Tensor:
        out = total.new_empty(self.size, len(total))
        dist.all_gather(list(out), total, group=self._group)
        return out.view(-1)[: torch.Size(shape).numel()].view(*shape)

    def release(self) -> None:
        if self.first:
            self.watch.ignore()

    def explain(self) -> AbstractContextManager[None]:
        return self.watch.explain()
