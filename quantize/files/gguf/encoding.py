"""Tensors as one GGUF file: parts wait in files of their own until all are there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantize.errors import ModelError, UsageError, VerifyError
from quantize.files.gguf.container import NUMBERS, TYPES, Entry, read_container
from quantize.files.gguf.layout import FILE, Names, Place, place_of
from quantize.files.transaction import Transaction

Describe = Callable[[Path, Mapping[str, Any]], tuple[Names, dict[str, Any], dict[str, Tensor]]]
"""Folder with the tokenizer, and config.json with all defaults → the family's names, the metadata,
and tensors that the file has beside the checkpoint's, by their names in it. ValueError for a model
that llama.cpp does not run."""


def require_writer() -> Any:
    """The package `gguf`, which writes the container; UsageError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise UsageError(
            "format: gguf needs the package gguf, which writes the file; pip install gguf"
        ) from None
    return gguf


class GgufFile:
    """The encoding of llama.cpp: one file with everything, tokenizer and metadata included."""

    def __init__(self, n_parts: int, describe: Describe) -> None:
        self._n_parts, self._describe = n_parts, describe
        self._parts: list[str] = []
        self._total = 0

    @property
    def total_size(self) -> int:
        """Bytes of tensor data so far; once finished, of those in the file."""
        return self._total

    @property
    def progress(self) -> dict[str, Any]:
        """What another one must know of the parts so far to go on."""
        return {"parts": self._parts, "total_size": self._total}

    def restore(self, written: Mapping[str, Any]) -> None:
        """Go on behind the parts that `written` names."""
        self._parts, self._total = list(written["parts"]), written["total_size"]

    def add(self, files: Transaction, tensors: Mapping[str, Tensor]) -> None:
        """Keep one part for the end."""
        name = f"part-{len(self._parts) + 1:05d}.safetensors"
        plain = {key: tensors[key].detach().cpu().contiguous() for key in sorted(tensors)}
        files.write(name, lambda path: save_file(plain, path))
        self._parts.append(name)
        self._total += sum(tensor.nbytes for tensor in plain.values())

    def finish(
        self, files: Transaction, config: Mapping[str, Any], facts: Mapping[str, Any]
    ) -> None:
        """Write the file, read it back and compare it bit for bit, and remove the parts.

        VerifyError where it differs or parts are missing, ModelError for a model that llama.cpp
        does not run.
        """
        if len(self._parts) != self._n_parts:
            raise VerifyError(
                f"{len(self._parts)} of {self._n_parts} parts were written; this is a bug in pq"
            )
        gguf = require_writer()
        try:
            names, metadata, more = self._describe(files.folder, facts)
            made = _Assembly(files.folder, self._parts, names, metadata, more)
        except ValueError as err:
            raise ModelError(f"format: gguf: {err}") from None
        files.write(FILE, lambda path: made.write(path, gguf), made.compare)
        for name in self._parts:
            files.discard(name)
        self._total = made.size


class _Assembly:
    """One file to be: where each tensor comes from and how it is stored. Memory holds one."""

    def __init__(
        self,
        folder: Path,
        parts: list[str],
        names: Names,
        metadata: dict[str, Any],
        more: dict[str, Tensor],
    ) -> None:
        self._folder, self._names, self._metadata, self._more = folder, names, metadata, more
        self._places: dict[str, tuple[str, str, Place]] = {}
        """Name in the file → part, name there, place."""
        self._shapes: dict[str, tuple[int, ...]] = {}
        for part in parts:
            with safe_open(folder / part, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - it is no mapping
                    tensor = file.get_tensor(key)
                    place = place_of(names, key, tensor, metadata)
                    if place.name in self._places:
                        raise ValueError(f"{key} would be written twice")
                    self._places[place.name] = (part, key, place)
                    self._shapes[place.name] = tuple(tensor.shape)

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(
            _bytes(place.type, self._shapes[n]) for n, (_, _, place) in self._places.items()
        ) + sum(tensor.nbytes for tensor in self._more.values())

    def write(self, path: Path, gguf: Any) -> None:
        """Metadata first, then one tensor after the other."""
        writer = gguf.GGUFWriter(path, self._names.architecture)
        for key, value in self._metadata.items():
            _add(writer, key, value)
        for name, tensor in self._more.items():
            writer.add_tensor_info(name, tuple(tensor.shape), tensor.numpy().dtype, tensor.nbytes)
        for name, (_, _, place) in self._places.items():
            shape = self._shapes[name]
            kind = gguf.GGMLQuantizationType(NUMBERS[place.type])
            array = torch.empty(0, dtype=_dtype(place.type)).numpy().dtype
            writer.add_tensor_info(name, shape, array, _bytes(place.type, shape), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in self._more.values():
            writer.write_tensor_data(tensor.numpy())
        for name in self._places:
            writer.write_tensor_data(self._stored(name).numpy())
        writer.close()

    def compare(self, path: Path) -> None:
        """VerifyError unless the file holds these tensors bit for bit, and no others."""
        found = read_container(path).tensors
        if set(found) != {*self._places, *self._more}:
            raise VerifyError(f"{path}: holds other tensors than were written; check the disk")
        for name, entry in found.items():
            wanted = self._more[name] if name in self._more else self._stored(name)
            back = read_rows(path, entry)
            if back.shape != wanted.shape or not torch.equal(_raw(back), _raw(wanted)):
                raise VerifyError(
                    f"{path}: {name} reads back differently from what was written; check the disk"
                )

    def _stored(self, name: str) -> Tensor:
        part, key, place = self._places[name]
        with safe_open(self._folder / part, framework="pt") as file:
            return place.stored(file.get_tensor(key)).contiguous()


def read_rows(path: Path, entry: Entry, first: int = 0, end: int | None = None) -> Tensor:
    """Entries `first` to `end` of a tensor's first axis as they are stored: floats, or bytes of
    blocks [N, bytes of a row]. ModelError where the file cannot be read."""
    stored = stored_shape(entry)
    end = stored[0] if end is None else end
    row = entry.bytes // stored[0]
    try:
        with path.open("rb") as file:
            file.seek(entry.offset + first * row)
            data = file.read((end - first) * row)
    except OSError as err:
        raise ModelError(f"{path}: cannot be read ({err})") from None
    if len(data) != (end - first) * row:
        raise ModelError(f"{path}: ends within a tensor; copy the folder again, or convert again")
    values = torch.frombuffer(bytearray(data), dtype=_dtype(entry.type.name))
    return values.reshape(end - first, *stored[1:])


def stored_shape(entry: Entry) -> tuple[int, ...]:
    """Shape of a tensor as it is stored: of blocks, their bytes are the innermost axis."""
    if entry.type.weights == 1:
        return entry.shape
    return (*entry.shape[:-1], entry.shape[-1] // entry.type.weights * entry.type.bytes)


def _dtype(kind: str) -> torch.dtype:
    return {"F32": torch.float32, "F16": torch.float16}.get(kind, torch.uint8)


def _bytes(kind: str, stored: tuple[int, ...]) -> int:
    """Bytes of a tensor of a shape as it is stored."""
    size = TYPES[NUMBERS[kind]].bytes if kind in ("F32", "F16") else 1
    for length in stored:
        size *= length
    return size


def _raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _add(writer: Any, key: str, value: Any) -> None:
    """Write a key with the type that llama.cpp expects of it."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
