"""Dataclasses as JSON data and named tensors, and back, led by the types of their fields.

Nothing is listed by hand: a field that is added to a dataclass is stored with it. A type that
cannot be stored is refused with its name when the first value of it is met, not left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

D = TypeVar("D")

_PLAIN = (Any, bool, int, float, str, NoneType)
_MAPPINGS = (dict, Mapping)
_SEQUENCES = (list, tuple, Sequence)


class Codec(NamedTuple):
    """How values of one type become JSON data, and how they are read from it."""

    write: Callable[[Any], Any]
    read: Callable[[Any], Any]


class Fields:
    """Writes and reads dataclasses. special: types with a JSON form of their own; equal values are
    kept once."""

    def __init__(self, special: Mapping[Any, Codec]) -> None:
        self._special = dict(special)

    def write(self, value: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """JSON data of a dataclass, and its tensors by the path of the field that holds them."""
        writer = _Writer(self._special)
        fields = writer.write(type(value), value, "")
        shared = [self._special[hint].write(one) for hint, one in writer.shared]
        return {"fields": fields, "shared": shared}, writer.tensors

    def read(self, cls: type[D], data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> D:
        """Undo `write`."""
        found: D = _Reader(self._special, data["shared"], tensors).read(cls, data["fields"])
        return found


def layout(cls: type[Any]) -> dict[str, str]:
    """Name of every field of a dataclass → its type: data of another layout cannot be read."""
    return {field.name: str(field.type) for field in dataclasses.fields(cls)}


class _Writer:
    def __init__(self, special: Mapping[Any, Codec]) -> None:
        self._special = special
        self.tensors: dict[str, Tensor] = {}
        self.shared: dict[tuple[Any, Any], int] = {}

    def write(self, hint: Any, value: Any, path: str) -> Any:
        origin = get_origin(hint)
        if hint in self._special:
            return self.shared.setdefault((hint, value), len(self.shared))
        if hint in _PLAIN or origin is Literal:
            return value
        if hint is Tensor:
            return self._tensor(value, path)
        if origin in (Union, UnionType):
            return None if value is None else self.write(_only(hint), value, path)
        if origin in _MAPPINGS:
            of_key, of_value = get_args(hint)
            keys = [self.write(of_key, key, path) for key in value]
            values = [
                self.write(of_value, one, f"{path}.{i}") for i, one in enumerate(value.values())
            ]
            pairs = zip(keys, values, strict=True)
            # JSON has names alone for keys.
            return dict(pairs) if of_key is str else [list(pair) for pair in pairs]
        if origin in _SEQUENCES and get_args(hint)[0] is Tensor:
            return self._tensor(torch.stack(list(value)), path)
        if origin in _SEQUENCES:
            elements = enumerate(_elements(hint, value))
            return [self.write(each, one, f"{path}.{i}") for i, (each, one) in elements]
        if dataclasses.is_dataclass(hint):
            hints = get_type_hints(hint)
            names = [field.name for field in dataclasses.fields(hint)]
            below = f"{path}." if path else ""
            return {
                name: self.write(hints[name], getattr(value, name), f"{below}{name}")
                for name in names
            }
        raise TypeError(f"{path}: there is no way to store {hint}")

    def _tensor(self, value: Tensor, path: str) -> str:
        self.tensors[path] = value
        return path


class _Reader:
    def __init__(
        self, special: Mapping[Any, Codec], shared: Sequence[Any], tensors: Mapping[str, Tensor]
    ) -> None:
        self._special = special
        self._shared = shared
        self._tensors = tensors
        self._known: dict[int, Any] = {}

    def read(self, hint: Any, data: Any) -> Any:
        origin = get_origin(hint)
        if hint in self._special:
            if data not in self._known:
                self._known[data] = self._special[hint].read(self._shared[data])
            return self._known[data]
        if hint in _PLAIN or origin is Literal:
            return data
        if hint is Tensor:
            return self._tensors[data]
        if origin in (Union, UnionType):
            return None if data is None else self.read(_only(hint), data)
        if origin in _MAPPINGS:
            of_key, of_value = get_args(hint)
            pairs = data.items() if of_key is str else data
            return {self.read(of_key, key): self.read(of_value, one) for key, one in pairs}
        if origin in _SEQUENCES:
            make = tuple if origin is tuple else list
            if get_args(hint)[0] is Tensor:
                return make(self._tensors[data])
            return make(self.read(each, one) for each, one in _elements(hint, data))
        hints = get_type_hints(hint)
        return hint(**{name: self.read(hints[name], one) for name, one in data.items()})


def _only(union: Any) -> Any:
    """The one type that a value may have beside None."""
    (hint,) = (hint for hint in get_args(union) if hint is not NoneType)
    return hint


def _elements(hint: Any, values: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Every element of a sequence with its type."""
    types = get_args(hint)
    if get_origin(hint) is tuple and types[-1] is not Ellipsis:
        return list(zip(types, values, strict=True))
    return [(types[0], value) for value in values]
