"""Tensors without numbers, which tell where theirs are stored.

transformers turns stored tensors into those of a model by its own operations, such as stacking the
matrices of experts. `lazy` gives these operations something to work on; what comes out says, for
every element, where it lies (`quantize/model/where.py`), so that a part of it is read by itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quantize.model.where import Cat, Computed, Where, flat, whole

__all__ = ["lazy", "where"]


class _Lazy(torch.Tensor):
    """A tensor without numbers that operations are tried on."""

    place: Where

    @staticmethod
    def __new__(cls, place: Where, dtype: torch.dtype) -> _Lazy:
        made = torch.Tensor._make_wrapper_subclass(
            cls, place.shape, dtype=dtype, device=torch.device("meta")
        )
        made.place = place
        return made

    def __init__(self, place: Where, dtype: torch.dtype) -> None:
        pass

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"lazy({self.place})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        move = _MOVES.get(func.overloadpacket)
        result = None if move is None else move(*args, **(kwargs or {}))
        if result is None:
            return _computed(func, args, kwargs or {})
        dtype = next(a.dtype for a in flat(args) if isinstance(a, _Lazy))
        if isinstance(result, list):
            return [_Lazy(one, dtype) for one in result]
        return _Lazy(result, dtype)


def lazy(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A stored tensor that has not been read; operations on it give lazy ones."""
    return _Lazy(whole(name, shape), dtype)


def where(tensor: Tensor) -> Where:
    """Where the numbers of a lazy tensor are stored."""
    assert isinstance(tensor, _Lazy)
    return tensor.place


# What operations do


def _frozen(values: Any) -> Any:
    if isinstance(values, tuple | list):
        return tuple(_frozen(value) for value in values)
    return values.place if isinstance(values, _Lazy) else values


def _computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Any other operation: its result is computed when it is read."""

    def meta(value: Any) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(meta(inner) for inner in value)
        if isinstance(value, _Lazy):
            return torch.empty(value.shape, dtype=value.dtype, device="meta")
        return value

    shapes = func(*meta(args), **{name: meta(value) for name, value in kwargs.items()})
    arguments, options = _frozen(args), tuple((n, _frozen(v)) for n, v in kwargs.items())

    def result(like: Tensor, index: int | None) -> Tensor:
        source = Computed(func, arguments, options, index)
        return _Lazy(whole(source, tuple(like.shape)), like.dtype)

    if isinstance(shapes, Tensor):
        return result(shapes, None)
    return [result(like, index) for index, like in enumerate(shapes)]


def _same(x: _Lazy, *_: Any, **__: Any) -> Where:
    return x.place


def _view(x: _Lazy, shape: Any) -> Where | None:
    sizes = [s for s in shape if s != -1]
    known = list(x.shape) == list(shape) or (
        len(shape) == x.ndim
        and [a for a, b in zip(x.shape, shape, strict=True) if b != -1] == sizes
    )
    return x.place if known else None


def _select(x: _Lazy, dim: int, index: int) -> Where:
    dim, size = dim % x.ndim, x.shape[dim]
    if not -size <= index < size:
        raise IndexError(f"entry {index} of {size}")
    return x.place.sliced(dim, index % size, 1, 1).dropped(dim)


def _slice(
    x: _Lazy, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Where:
    dim = dim % x.ndim
    taken = range(x.shape[dim])[start:end:step]
    return x.place.sliced(dim, taken.start, len(taken), step)


def _permute(x: _Lazy, dims: Any) -> Where:
    return x.place.permuted(tuple(d % x.ndim for d in dims))


def _transpose(x: _Lazy, dim0: int, dim1: int) -> Where:
    dims = list(range(x.ndim))
    dims[dim0], dims[dim1] = dims[dim1], dims[dim0]
    return x.place.permuted(tuple(dims))


def _turn(x: _Lazy) -> Where:
    return x.place.permuted(tuple(reversed(range(x.ndim))))


def _unsqueeze(x: _Lazy, dim: int) -> Where:
    return x.place.widened(dim % (x.ndim + 1))


def _squeeze(x: _Lazy, dim: Any = None) -> Where:
    given = range(x.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    place = x.place
    for one in sorted({d % x.ndim for d in given}, reverse=True):
        if x.shape[one] == 1:
            place = place.dropped(one)
    return place


def _join(tensors: Any, dim: int = 0) -> Where | None:
    if not all(isinstance(x, _Lazy) for x in tensors):
        return None
    dim = dim % tensors[0].ndim
    shapes = [(*x.shape[:dim], *x.shape[dim + 1 :]) for x in tensors]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"tensors of {[list(x.shape) for x in tensors]} cannot be joined")
    return Cat(tuple(x.place for x in tensors), dim) if len(tensors) > 1 else tensors[0].place


def _stack(tensors: Any, dim: int = 0) -> Where | None:
    if not all(isinstance(x, _Lazy) for x in tensors):
        return None
    if any(x.shape != tensors[0].shape for x in tensors):
        raise ValueError(f"tensors of {[list(x.shape) for x in tensors]} cannot be stacked")
    dim = dim % (tensors[0].ndim + 1)
    parts = tuple(x.place.widened(dim) for x in tensors)
    return Cat(parts, dim) if len(parts) > 1 else parts[0]


def _sizes(x: _Lazy, sizes: list[int], dim: int = 0) -> list[Where]:
    dim = dim % x.ndim
    starts = itertools.accumulate(sizes, initial=0)
    return [x.place.sliced(dim, start, size, 1) for start, size in zip(starts, sizes, strict=False)]


def _split(x: _Lazy, size: Any, dim: int = 0) -> list[Where]:
    if not isinstance(size, int):
        return _sizes(x, list(size), dim)
    whole = x.shape[dim]
    return _sizes(x, [min(size, whole - at) for at in range(0, whole, size)], dim)


def _unbind(x: _Lazy, dim: int = 0) -> list[Where]:
    return [_select(x, dim, index) for index in range(x.shape[dim])]


_aten = torch.ops.aten
_MOVES: dict[Any, Callable[..., Any]] = {
    _aten.detach: _same,
    _aten.alias: _same,
    _aten.clone: _same,
    _aten.view: _view,
    _aten._unsafe_view: _view,
    _aten.select: _select,
    _aten.slice: _slice,
    _aten.permute: _permute,
    _aten.transpose: _transpose,
    _aten.t: _turn,
    _aten.unsqueeze: _unsqueeze,
    _aten.squeeze: _squeeze,
    _aten.cat: _join,
    _aten.stack: _stack,
    _aten.split: _split,
    _aten.split_with_sizes: _sizes,
    _aten.unbind: _unbind,
}
