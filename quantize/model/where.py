"""Where the numbers of a tensor lie in stored ones, and how to fetch them.

A description is cut, turned and joined without reading anything; `fetch` then reads no more of the
stored tensors than it names. `quantize/model/lazy.py` makes descriptions from torch's operations.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

__all__ = ["Cat", "Computed", "Part", "Rows", "View", "Where", "fetch", "names_in", "whole"]

Rows = Callable[[str, int | None, int | None], Tensor]
"""(name, first, end) → entries of a stored tensor's first dimension; None, None: all of it."""


@dataclass(frozen=True)
class Computed:
    """The result of an operation that does more than move numbers; its inputs are read whole."""

    operation: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]
    index: int | None
    """Which of several results."""


@dataclass(frozen=True)
class Part:
    """A rectangle of one stored (or computed) tensor, its dimensions in any order."""

    source: str | Computed
    whole: tuple[int, ...]
    """Shape of the source."""
    ranges: tuple[tuple[int, int, int], ...]
    """First, count and step in every dimension of the source."""
    order: tuple[int | None, ...]
    """The source's dimension behind each one; None: inserted, of size 1."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of every dimension."""
        return tuple(1 if d is None else self.ranges[d][1] for d in self.order)

    @property
    def is_whole(self) -> bool:
        """Whether it is the stored tensor as it stands."""
        full = tuple((0, size, 1) for size in self.whole)
        return self.ranges == full and self.order == tuple(range(len(full)))

    def permuted(self, dims: tuple[int, ...]) -> Where:
        """Dimension i becomes what dims[i] was."""
        return Part(self.source, self.whole, self.ranges, tuple(self.order[d] for d in dims))

    def widened(self, dim: int) -> Where:
        """A dimension of size 1 is inserted."""
        return Part(
            self.source, self.whole, self.ranges, (*self.order[:dim], None, *self.order[dim:])
        )

    def dropped(self, dim: int) -> Where:
        """A dimension of size 1 goes."""
        return Part(self.source, self.whole, self.ranges, self.order[:dim] + self.order[dim + 1 :])

    def sliced(self, dim: int, first: int, count: int, step: int) -> Where:
        """Every `step`th of the entries of a dimension, `count` in all."""
        d = self.order[dim]
        if d is None:
            return self
        ranges = list(self.ranges)
        start, _, stride = ranges[d]
        ranges[d] = (start + first * stride, count, stride * step)
        return Part(self.source, self.whole, tuple(ranges), self.order)


@dataclass(frozen=True)
class Cat:
    """Tensors one after the other along a dimension."""

    parts: tuple[Where, ...]
    dim: int

    @cached_property
    def _ends(self) -> list[int]:
        return list(itertools.accumulate(part.shape[self.dim] for part in self.parts))

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Size of every dimension."""
        first = self.parts[0].shape
        return (*first[: self.dim], self._ends[-1], *first[self.dim + 1 :])

    def permuted(self, dims: tuple[int, ...]) -> Where:
        """As `Part.permuted`."""
        return Cat(tuple(part.permuted(dims) for part in self.parts), dims.index(self.dim))

    def widened(self, dim: int) -> Where:
        """As `Part.widened`."""
        parts = tuple(part.widened(dim) for part in self.parts)
        return Cat(parts, self.dim + (dim <= self.dim))

    def dropped(self, dim: int) -> Where:
        """As `Part.dropped`."""
        if dim == self.dim:
            full = [part for part in self.parts if part.shape[dim]]
            return full[0].dropped(dim)
        parts = tuple(part.dropped(dim) for part in self.parts)
        return Cat(parts, self.dim - (dim < self.dim))

    def sliced(self, dim: int, first: int, count: int, step: int) -> Where:
        """As `Part.sliced`; parts that nothing is taken from are gone."""
        if dim != self.dim:
            return Cat(tuple(part.sliced(dim, first, count, step) for part in self.parts), self.dim)
        taken: list[Where] = []
        last = first + (count - 1) * step
        index = bisect.bisect_right(self._ends, first) if count else len(self.parts)
        at = first
        while index < len(self.parts) and at <= last:
            begin = self._ends[index - 1] if index else 0
            inside = (min(last, self._ends[index] - 1) - at) // step + 1
            if inside > 0:
                taken.append(self.parts[index].sliced(dim, at - begin, inside, step))
                at += inside * step
            index += 1
        if not taken:
            return self.parts[0].sliced(dim, 0, 0, 1)
        return taken[0] if len(taken) == 1 else Cat(tuple(taken), dim)


Where = Part | Cat


def whole(source: str | Computed, shape: tuple[int, ...]) -> Part:
    """All of a tensor."""
    return Part(source, shape, tuple((0, size, 1) for size in shape), tuple(range(len(shape))))


@dataclass(frozen=True)
class View:
    """As much of a tensor as taking experts out of a stack needs, hundreds of times as fast."""

    place: Where

    @property
    def shape(self) -> tuple[int, ...]:
        """Size of every dimension."""
        return self.place.shape

    @property
    def T(self) -> View:  # noqa: N802  # as torch calls it
        """Its dimensions in the opposite order."""
        return View(self.place.permuted(tuple(reversed(range(len(self.shape))))))

    def __getitem__(self, index: int | slice) -> View:
        if isinstance(index, int):
            return View(self.place.sliced(0, range(self.shape[0])[index], 1, 1).dropped(0))
        taken = range(self.shape[0])[index]
        return View(self.place.sliced(0, taken.start, len(taken), taken.step))

    def chunk(self, parts: int) -> tuple[View, ...]:
        """Equal parts of the first dimension, the last of which may be shorter."""
        size = -(-self.shape[0] // parts)
        return tuple(self[at : at + size] for at in range(0, self.shape[0], size))


def names_in(place: Where) -> tuple[str, ...]:
    """The stored tensors that a lazy one is made from."""
    if isinstance(place, Cat):
        return tuple(dict.fromkeys(name for part in place.parts for name in names_in(part)))
    if isinstance(place.source, str):
        return (place.source,)
    inner = flat((place.source.arguments, place.source.options))
    return tuple(dict.fromkeys(n for a in inner if isinstance(a, Part | Cat) for n in names_in(a)))


def fetch(place: Where, rows: Rows) -> Tensor:
    """The numbers themselves, contiguous; nothing is read but what they stand among.

    Of a stored tensor whole entries of the first dimension are read.
    """
    if isinstance(place, Cat):
        return torch.cat([fetch(part, rows) for part in place.parts], place.dim)
    if isinstance(place.source, Computed):
        made = place.source
        result = made.operation(
            *_fetched(made.arguments, rows), **dict(_fetched(made.options, rows))
        )
        tensor: Tensor = result if made.index is None else result[made.index]
        return _cut(tensor, place, place.ranges)
    if place.is_whole or not place.ranges:
        return _cut(rows(place.source, None, None), place, place.ranges)
    (first, count, step), *rest = place.ranges
    if not count:
        return _cut(rows(place.source, 0, 1), place, ((0, 0, 1), *rest))
    read = rows(place.source, first, first + (count - 1) * step + 1)
    return _cut(read, place, ((0, count, step), *rest))


def _cut(tensor: Tensor, place: Part, ranges: tuple[tuple[int, int, int], ...]) -> Tensor:
    index = tuple(
        slice(first, first + (count - 1) * step + 1 if count else first, step)
        for first, count, step in ranges
    )
    tensor = tensor[index] if index else tensor
    kept = [d for d in place.order if d is not None]
    gone = [d for d in range(tensor.ndim) if d not in kept]
    tensor = tensor.permute((*kept, *gone)).reshape(place.shape)
    # A part of what was read would hold all of it.
    return tensor if place.is_whole else tensor.clone(memory_format=torch.contiguous_format)


def _fetched(values: Any, rows: Rows) -> Any:
    if isinstance(values, tuple):
        return tuple(_fetched(value, rows) for value in values)
    return fetch(values, rows) if isinstance(values, Part | Cat) else values


def flat(values: Any) -> list[Any]:
    if isinstance(values, tuple | list):
        return [inner for value in values for inner in flat(value)]
    return [values]
