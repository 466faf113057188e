"""The walk through a model's decoder blocks: open one, visit it, send every batch on through it,
free it.

Whoever goes through a model block by block does it here: conversion, allocation, the search for
layers, evaluation and verification. `Pass` is the one place where a batch is sent through a decoder
layer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, MutableSequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor, nn

from quantize.errors import ModelError
from quantize.parallel.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from quantize.files.offload import Parking
    from quantize.model.skeleton import Skeleton

log = logging.getLogger(__name__)

Key = TypeVar("Key", bound=Hashable)
Opened = TypeVar("Opened")
Send = Callable[[Tensor], Tensor]
"""Hidden states [B, T, D] that enter a block → those that leave it."""
Route = tuple[Key, Send]
"""How a stream goes on: the stream before the block that it continues, and what its batches are
sent through."""


@dataclass(frozen=True)
class Pass:
    """Sends batches through layers that stand in the place of one block."""

    skeleton: Skeleton
    index: int
    parking: Parking | None = None
    """Brings back what was put away of a layer before it runs."""

    def __call__(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Run `layer` on hidden [B, T, D], wherever that waits; the outputs [B, T, D] are on the
        skeleton's device."""
        if self.parking:
            self.parking.back(layer)
        return self.skeleton.forward(self.index, layer, hidden.to(self.skeleton.device))


class Streams(Generic[Key]):
    """Hidden states [B, T, D] that enter the current block, batch by batch, of one or several
    models at once.

    batches: in lists or in what `files.offload` has for them. All streams hold the same windows in
    the same order.
    drops: whether a window with NaN or Inf in some stream leaves all of them. ranks: the processes
    that share the work, which must all call `advance`.
    """

    def __init__(
        self,
        batches: Mapping[Key, MutableSequence[Tensor]],
        ranks: Ranks = ALONE,
        dropped: int = 0,
        drops: bool = True,
    ) -> None:
        self.batches: dict[Key, MutableSequence[Tensor]] = dict(batches)
        self.ranks = ranks
        self.dropped = dropped
        """Windows left out so far."""
        self._drops = drops

    def advance(self, index: int, routes: Mapping[Key, Route[Key]]) -> None:
        """Send all batches through block `index`.

        routes: stream behind the block → how it comes about. A stream that keeps its name is
        overwritten batch by batch; one that is not named ends here.
        ModelError when no window is left.
        """
        before = self.dropped
        after = {key: self.batches.get(key, []) for key in routes}
        for batch, outputs in enumerate(self._outputs(routes)):
            if self._drops:
                outputs = self._finite(outputs)
            for hidden, out in zip(after.values(), outputs, strict=True):
                if batch < len(hidden):
                    hidden[batch] = out
                else:
                    hidden.append(out)
        self.batches = after
        if self.dropped == before:
            return
        log.warning("block %d: %d sequences became non-finite", index, self.dropped - before)
        for hidden in after.values():
            for batch in reversed(range(len(hidden))):
                if not len(hidden[batch]):
                    del hidden[batch]
        if not all(after.values()):
            what = "its outputs are not finite for any sequence"
            raise ModelError(f"block {index}: {what}; try --dtype float32")

    def clear(self) -> None:
        """Free the hidden states of all streams."""
        self.batches = {key: [] for key in self.batches}

    def _finite(self, outputs: list[Tensor]) -> list[Tensor]:
        """The windows of one batch that are finite in all streams."""
        finite = torch.stack([out.isfinite().flatten(1).all(dim=1) for out in outputs]).all(dim=0)
        if finite.all():
            return outputs
        self.dropped += int((~finite).sum())
        return [out[finite] for out in outputs]

    def _outputs(self, routes: Mapping[Key, Route[Key]]) -> Iterator[list[Tensor]]:
        """Outputs of all routes, batch by batch; every rank computes some batches and receives the
        others."""
        entering = [(self.batches[source], send) for source, send in routes.values()]
        shapes, first = entering[0][0], 0
        for own, present in self.ranks.rounds(len(shapes)):
            outputs = [send(hidden[own]) for hidden, send in entering]
            for source in range(present):
                sent = outputs
                if source != self.ranks.rank:
                    sent = [torch.empty_like(shapes[first + source]) for _ in outputs]
                yield [self.ranks.copy(out, source) for out in sent]
            first += present


def walk(
    streams: Streams[Key] | None,
    indices: Iterable[int],
    open_block: Callable[[int], Opened],
    visit: Callable[[Opened], Mapping[Key, Route[Key]] | None],
    leave: Callable[[Opened], None] = lambda block: None,
) -> None:
    """Open the blocks one after the other, visit each, send the streams on through it, leave it and
    free it.

    visit: says how the streams go on (see `Streams.advance`); None where they need not. leave: what
    is done with a block that all batches have passed. Only one block is in memory at a time, as
    long as neither keeps it.
    """
    for index in indices:
        with torch.no_grad():
            _step(streams, index, open_block(index), visit, leave)


def _step(
    streams: Streams[Key] | None,
    index: int,
    block: Opened,
    visit: Callable[[Opened], Mapping[Key, Route[Key]] | None],
    leave: Callable[[Opened], None],
) -> None:
    # A function of its own, so that nothing refers to the block when the next one is opened.
    routes = visit(block)
    if streams is not None and routes:
        streams.advance(index, routes)
    leave(block)
