"""Suspicious reading of the container of GGUF files: header, metadata, and where tensors lie.

Layout (`docs/gguf.md` of ggml, version 3, little-endian): magic "GGUF", version, number of tensors,
number of keys; for each key its name, type and value; for each tensor its name, number of axes, their
lengths with the innermost first, its type, and its offset from the data, which begins at the next
multiple of the alignment.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from quantize.errors import ModelError

MAGIC, VERSION = b"GGUF", 3
ALIGNMENT = 32
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_MOST_TENSORS, _MOST_KEYS, _MOST_AXES = 1 << 20, 1 << 16, 4
_LONGEST_NAME = 1 << 16
_KEPT_ITEMS = 1 << 12
"""Longer arrays, such as vocabularies, are passed over."""


@dataclass(frozen=True)
class Type:
    """How the elements of a tensor are stored."""

    name: str
    weights: int
    """In a block, which are consecutive elements of the innermost axis."""
    bytes: int
    """Of a block."""


TYPES = {
    0: Type("F32", 1, 4),
    1: Type("F16", 1, 2),
    2: Type("q4_0", 32, 18),
    3: Type("q4_1", 32, 20),
    8: Type("q8_0", 32, 34),
}
"""Those that pq writes, by number."""
NUMBERS = {kind.name: number for number, kind in TYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor of a file."""

    type: Type
    shape: tuple[int, ...]
    """Outermost axis first, in elements."""
    offset: int
    """From the beginning of the file."""
    bytes: int


@dataclass(frozen=True)
class Container:
    """What a file says of itself."""

    metadata: dict[str, Any]
    """Values by key; None for arrays too long to be kept."""
    tensors: dict[str, Entry]


def read_container(path: Path) -> Container:
    """Header, metadata and tensors of a file; ModelError for one that is none, or goes beyond its
    end, or has a type of tensor that pq does not write."""
    try:
        with path.open("rb") as file:
            return _Reader(file, path.stat().st_size).container()
    except (OSError, ValueError, struct.error, UnicodeDecodeError) as err:
        raise ModelError(
            f"{path}: not a GGUF file that pq can read ({' '.join(str(err).split())[:200]}); copy "
            "the folder again, or convert again"
        ) from None


class _Reader:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size

    def container(self) -> Container:
        if self._bytes(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        if (version := self._number("I")) != VERSION:
            raise ValueError(f"version {version}, only {VERSION} is read")
        tensors, keys = self._number("Q"), self._number("Q")
        if tensors > _MOST_TENSORS or keys > _MOST_KEYS:
            raise ValueError(f"{tensors} tensors and {keys} keys")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self._string()
            if key in metadata:
                raise ValueError(f"the key {key[:80]!r} stands twice")
            metadata[key] = self._value(self._number("I"))
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if alignment != ALIGNMENT:
            raise ValueError(f"tensors are aligned to {alignment!r} bytes, not to {ALIGNMENT}")
        infos = [self._info() for _ in range(tensors)]
        start = math.ceil(self.file.tell() / ALIGNMENT) * ALIGNMENT
        found: dict[str, Entry] = {}
        end = start
        for name, kind, shape, offset in sorted(infos, key=lambda info: info[3]):
            size = math.prod(shape) // kind.weights * kind.bytes
            if name in found:
                raise ValueError(f"the tensor {name[:80]!r} stands twice")
            if offset % ALIGNMENT or start + offset < end or start + offset + size > self.size:
                raise ValueError(f"{name} lies at {offset}, over another tensor or beyond the end")
            end = start + offset + size
            found[name] = Entry(kind, shape, start + offset, size)
        return Container(metadata, found)

    def _info(self) -> tuple[str, Type, tuple[int, ...], int]:
        name, axes = self._string(), self._number("I")
        if not 1 <= axes <= _MOST_AXES:
            raise ValueError(f"{name[:80]!r} has {axes} axes")
        shape = tuple(reversed([self._number("Q") for _ in range(axes)]))
        number, offset = self._number("I"), self._number("Q")
        if number not in TYPES:
            known = ", ".join(kind.name for kind in TYPES.values())
            raise ValueError(f"{name[:80]!r} is of type {number}; pq writes {known}")
        kind = TYPES[number]
        if not all(0 < length <= self.size for length in shape) or shape[-1] % kind.weights:
            raise ValueError(f"{name[:80]!r} is {kind.name} {list(shape)}")
        return name, kind, shape, offset

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._string(self.size)
        if kind != _ARRAY:
            raise ValueError(f"values of type {kind}")
        inner, count = self._number("I"), self._number("Q")
        if count > self.size:
            raise ValueError(f"an array of {count} values")
        if inner in _SCALARS:
            width = struct.calcsize(f"<{_SCALARS[inner]}")
            data = self._bytes(width * count)
            return (
                list(struct.unpack(f"<{count}{_SCALARS[inner]}", data))
                if count <= _KEPT_ITEMS
                else None
            )
        if inner != _STRING:
            raise ValueError(f"an array of values of type {inner}")
        if count <= _KEPT_ITEMS:
            return [self._string(self.size) for _ in range(count)]
        for _ in range(count):
            self._bytes(self._number("Q"))
        return None

    def _string(self, most: int = _LONGEST_NAME) -> str:
        length = self._number("Q")
        if length > most:
            raise ValueError(f"a name of {length} bytes")
        return self._bytes(length).decode("utf-8")

    def _number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self._bytes(struct.calcsize(f"<{kind}")))[0]

    def _bytes(self, count: int) -> bytes:
        if count > self.size:
            raise ValueError(f"{count} bytes of a file of {self.size}")
        data = self.file.read(count)
        if len(data) != count:
            raise ValueError("it ends within its header")
        return data
